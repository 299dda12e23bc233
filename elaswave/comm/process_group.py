"""ElasticProcessGroup: backend "elastic" of torch.distributed, a process group that outlives the loss of ranks.

    import elaswave.comm.process_group
    torch.distributed.init_process_group("elastic", ...)

A collective that meets a loss raises EpochChanged on all survivors or succeeds on all. See docs/communicators.md.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, ClassVar, TypeVar

import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from elaswave.comm.admission import Newcomer, take_in
from elaswave.comm.arena import ARENA_BYTES
from elaswave.comm.fabric import Fabric
from elaswave.comm.grid_group import GridGroup
from elaswave.comm.group import Group, flat_of
from elaswave.comm.native import HybridGroup, NativeEditor, NativeFactory
from elaswave.comm.operation import Operation
from elaswave.comm.operators import average_over, combine_of
from elaswave.comm.works import DoneWork, OperationWork, ReceiveWork
from elaswave.errors import ConfigError, ElasWaveError, EpochChanged, InvariantError

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store, _DistributedBackendOptions

GROUPS_PER_EPOCH = 1 << 20
"""More than any program makes between two losses."""

Tensors = Sequence[Tensor]
Result = TypeVar("Result")


class ElasticProcessGroup(dist.ProcessGroup):
    """Collectives over links that are edited in place; any dtype on the CPU. Made by torch.distributed."""

    fabric: ClassVar[Fabric | None] = None
    """Of this process: its sockets and peers are shared by all its groups."""

    def __init__(self, group: Group, fabric: Fabric, name: str) -> None:
        """`group` belongs to the new process group."""
        super().__init__(group.communicator.rank, group.communicator.size)  # type: ignore[call-arg]
        self._group = group
        self._fabric = fabric
        self._name = name
        self._description = "elastic"
        self._newcomer = Newcomer(lacks_state=fabric.has_joined)

    # ------------------------------------------------------------------ what torch asks

    def getBackendName(self) -> str:
        return "elastic"

    def rank(self) -> int:
        return self._group.communicator.rank

    def size(self) -> int:
        return self._group.communicator.size

    getRank, getSize = rank, size

    @property
    def pg_name(self) -> str:
        return self._name

    @property
    def group_name(self) -> str:
        return self._name

    @property
    def group_desc(self) -> str:
        return self._description

    def getGroupName(self) -> str:
        return self._name

    def setGroupName(self, name: str) -> None:
        self._name = name

    _set_group_name = setGroupName

    def getGroupDesc(self) -> str:
        return self._description

    def setGroupDesc(self, description: str) -> None:
        self._description = description

    _set_group_desc = setGroupDesc

    def set_timeout(self, timeout: timedelta) -> None:
        self._group.timeout_s = timeout.total_seconds()

    _set_default_timeout = set_timeout

    def abort(self) -> None:
        """End the group here at once."""
        self.shutdown()

    def shutdown(self) -> None:
        """End the group here; the process's last one says good-bye to the peers."""
        self._fabric.drop(self._group.communicator)
        self._group.close()

    # ------------------------------------------------------------------ losses

    @property
    def epoch(self) -> int:
        """Of the members: 0 at first."""
        return self._group.communicator.epoch

    def reconfigure(self, options: object = None) -> None:
        """After EpochChanged: all groups of this process work on with their survivors, whose ranks are new.

        Name and place of torch 2.14's method. After DeadlineExceeded it waits until whoever is stuck was killed.
        EpochChanged: this process was taken for lost itself. DeadlineExceeded: after the timeout of the first group.
        """
        del options
        _update_tables(self._fabric.reconfigure())

    def admit(self, share: Callable[[int], object]) -> bool:
        """At a place in the program that all ranks come to: processes that wait in `join` become ranks, the last ones.

        `share` is then called on all ranks, on the new ones in their first call of this, with the rank that has to
        bring them what they lack: parameters, the state of the optimizer, the step. DDP is made anew there, too. It is
        called again in the next call where a loss has interrupted it. Returns whether it was. For the default group;
        other groups stay as they are. Raises EpochChanged after a loss: reconfigure() and repeat the step, this call
        included. FaultError: all ranks that had the state are lost. ConfigError: this is not the default group.
        """
        if not self._fabric.is_world(self._group.communicator):
            raise ConfigError(
                f"group {self._name} cannot grow: call admit() of the default group, and make this one anew"
            )
        while True:
            with self.guard():
                losses = self._fabric.losses
                applicants = self._fabric.applicants() if self.rank() == 0 else []
                survey = self._newcomer.survey(self._group, bool(applicants))
                if survey.wanted:
                    _update_tables(take_in(self._fabric, applicants, losses))
                    continue
                if survey.lacking:
                    self._newcomer.receive(self._group, share, survey.source)
                return survey.lacking

    def hybrid(self, factory: NativeFactory | NativeEditor) -> HybridGroup:
        """All-reduces of this group over a native communicator where every rank has built one; see HybridGroup."""
        return HybridGroup(self._group, factory, self._group.communicator.name)

    def grid(self, factory: NativeFactory) -> GridGroup:
        """The same over a grid of small native communicators, which goes on natively after a loss; see GridGroup."""
        return GridGroup(self._group, factory, self._group.communicator.name)

    @contextmanager
    def guard(self) -> Iterator[None]:
        """Raise EpochChanged where torch's C++ code has made another exception of it, as DDP's backward pass does.

        The same for what else operations fail with, such as DeadlineExceeded, and where tensors were refused because
        they were made for the ranks of before the loss.
        """
        try:
            yield
        except ElasWaveError as error:
            if isinstance(error, ConfigError) and self._fabric.broken and self._fabric.failure is None:
                raise EpochChanged("a member was lost: call reconfigure() and repeat the step") from error
            raise
        except Exception as error:
            if self._fabric.failure is not None:
                raise self._fabric.failure from error
            if not self._fabric.broken:
                raise
            raise EpochChanged("a member was lost: call reconfigure() and repeat the step") from error

    # ------------------------------------------------------------------ collectives

    def allreduce(self, tensors: Tensors, opts: "dist.AllreduceOptions | None" = None) -> dist.Work:
        return self._all_reduce(tensors, opts)

    def allreduce_coalesced(self, tensors: Tensors, opts: "dist.AllreduceCoalescedOptions | None" = None) -> dist.Work:
        return self._all_reduce(tensors, opts)

    def _all_reduce(self, tensors: Tensors, opts: object) -> dist.Work:
        operator = getattr(opts, "reduceOp", dist.ReduceOp.SUM)
        combines, size = [combine_of(operator, tensor.dtype) for tensor in tensors], self.size()
        operations = [
            self._group.all_reduce(tensor, combine, average_over(operator, tensor, size))
            for tensor, combine in zip(tensors, combines, strict=True)
        ]
        return self._works(operations, tensors, opts)

    def broadcast(self, tensors: Tensors, opts: "dist.BroadcastOptions | None" = None) -> dist.Work:
        root = 0 if opts is None else opts.rootRank
        return self._works([self._group.broadcast(tensor, root) for tensor in tensors], tensors, opts)

    def reduce(self, tensors: Tensors, opts: "dist.ReduceOptions | None" = None) -> dist.Work:
        operator = getattr(opts, "reduceOp", dist.ReduceOp.SUM)
        root = 0 if opts is None else opts.rootRank
        combines, size, mine = (
            [combine_of(operator, tensor.dtype) for tensor in tensors],
            self.size(),
            self.rank() == root,
        )
        operations = [
            self._group.reduce(tensor, root, combine, average_over(operator, tensor, size) if mine else None)
            for tensor, combine in zip(tensors, combines, strict=True)
        ]
        return self._works(operations, tensors, opts)

    def allgather(self, outputs: Sequence[Tensors], inputs: Tensors, opts: object = None) -> dist.Work:
        operations = [self._group.all_gather(outs, given) for outs, given in zip(outputs, inputs, strict=True)]
        return self._works(operations, [tensor for outs in outputs for tensor in outs], opts)

    def allgather_coalesced(self, outputs: Sequence[Tensors], inputs: Tensors, opts: object = None) -> dist.Work:
        # outputs[rank][i], the other way round than in allgather
        turned = [list(outs) for outs in zip(*outputs, strict=True)]
        return self.allgather(turned, inputs, opts)

    def _allgather_base(self, output: Tensor, given: Tensor, opts: object = None) -> dist.Work:
        return self.allgather_into_tensor_coalesced([output], [given], opts)

    all_gather_single = _allgather_base

    def allgather_into_tensor_coalesced(self, outputs: Tensors, inputs: Tensors, opts: object = None) -> dist.Work:
        pieces = [_equal_parts(flat_view(output), self.size()) for output in outputs]
        operations = [self._group.all_gather(outs, given) for outs, given in zip(pieces, inputs, strict=True)]
        return self._works(operations, outputs, opts)

    all_gather_single_coalesced = allgather_into_tensor_coalesced

    def reduce_scatter(self, outputs: Tensors, inputs: Sequence[Tensors], opts: object = None) -> dist.Work:
        operator = getattr(opts, "reduceOp", dist.ReduceOp.SUM)
        combines, size = [combine_of(operator, out.dtype) for out in outputs], self.size()
        operations = [
            self._group.reduce_scatter(out, given, combine, average_over(operator, out, size))
            for out, given, combine in zip(outputs, inputs, combines, strict=True)
        ]
        return self._works(operations, outputs, opts)

    def _reduce_scatter_base(self, output: Tensor, given: Tensor, opts: object = None) -> dist.Work:
        return self.reduce_scatter_tensor_coalesced([output], [given], opts)

    reduce_scatter_single = _reduce_scatter_base

    def reduce_scatter_tensor_coalesced(self, outputs: Tensors, inputs: Tensors, opts: object = None) -> dist.Work:
        return self.reduce_scatter(outputs, [_equal_parts(flat_of(given), self.size()) for given in inputs], opts)

    reduce_scatter_single_coalesced = reduce_scatter_tensor_coalesced

    def scatter(self, outputs: Tensors, inputs: Sequence[Tensors], opts: "dist.ScatterOptions") -> dist.Work:
        mine = self.rank() == opts.rootRank
        operations = [
            self._group.scatter(output, inputs[index] if mine else [], opts.rootRank)
            for index, output in enumerate(outputs)
        ]
        return self._works(operations, outputs, opts)

    def gather(self, outputs: Sequence[Tensors], inputs: Tensors, opts: "dist.GatherOptions") -> dist.Work:
        mine = self.rank() == opts.rootRank
        operations = [
            self._group.gather(outputs[index] if mine else [], given, opts.rootRank)
            for index, given in enumerate(inputs)
        ]
        return self._works(operations, [tensor for outs in outputs for tensor in outs], opts)

    def alltoall(self, outputs: Tensors, inputs: Tensors, opts: object = None) -> dist.Work:
        return self._works([self._group.all_to_all(outputs, inputs)], outputs, opts)

    def alltoall_base(
        self, output: Tensor, given: Tensor, output_sizes: list[int], input_sizes: list[int], opts: object = None
    ) -> dist.Work:
        outputs = _rows(output, output_sizes, self.size())
        return self._works([self._group.all_to_all(outputs, _rows(given, input_sizes, self.size()))], [output], opts)

    all_to_all_single = alltoall_base

    def barrier(self, opts: object = None) -> dist.Work:
        return self._works([self._group.barrier()], [], opts)

    def monitored_barrier(self, timeout: timedelta | None = None, wait_all_ranks: bool = False) -> None:
        del wait_all_ranks
        before = self._group.timeout_s
        self._group.timeout_s = before if timeout is None else timeout.total_seconds()
        try:
            self.barrier().wait()
        finally:
            self._group.timeout_s = before

    # ------------------------------------------------------------------ messages

    def send(self, tensors: Tensors, destination: int, tag: int = 0) -> dist.Work:
        for tensor in tensors:
            self._group.endpoint.send(self._group.communicator, destination, tag, flat_of(tensor))
        return DoneWork(list(tensors))

    def recv(self, tensors: Tensors, source: int, tag: int = 0) -> dist.Work:
        return self._receive(tensors, source, tag)

    def recv_anysource(self, tensors: Tensors, tag: int = 0) -> dist.Work:
        return self._receive(tensors, None, tag)

    def _receive(self, tensors: Tensors, source: int | None, tag: int) -> dist.Work:
        (tensor,) = tensors
        return ReceiveWork(self._group, source, tag, tensor)

    def _works(self, operations: list[Operation], tensors: Tensors, opts: object) -> dist.Work:
        self._fabric.check_departed(self._group.communicator)
        work = OperationWork(self._group.endpoint, operations, list(tensors))
        if getattr(opts, "asyncOp", False):
            self._group.endpoint.attend()
        return work


class Joining:
    """Option of init_process_group: this process is none of those that the job began with."""


def join(
    *, store: "Store | None" = None, init_method: str | None = None, timeout: timedelta | None = None
) -> ElasticProcessGroup:
    """Become a rank of a job that runs, in place of init_process_group; the default group, once its ranks `admit` us.

    store, init_method: those of the other ranks, who host the store. timeout: theirs; also how long to wait for them.
    Call `admit` next, at the same place as they. Raises DeadlineExceeded where nobody admits us in time.
    """
    # Rank and size are found out; torch wants some, and takes rank 0 for the host of the store.
    dist.init_process_group(
        "elastic", store=store, init_method=init_method, rank=1, world_size=2, timeout=timeout, pg_options=Joining()
    )
    group = dist.group.WORLD
    if not isinstance(group, ElasticProcessGroup):
        raise InvariantError(f"the default group is {group!r}")
    group.reconfigure()
    return group


def run_step(step: Callable[[], Result], model: nn.Module) -> Result:
    """What `step` returns: a forward and backward pass of `model`, run again after each loss by whoever is left.

    Over the default group; all its ranks call it. A step must leave parameters alone, and end with an operation of the
    default group, as DDP's backward pass does: apply the optimizer afterwards. Raises what `step` does otherwise, and
    EpochChanged where this process itself was removed. ConfigError: the default group is not elastic.
    """
    group = dist.group.WORLD
    if not isinstance(group, ElasticProcessGroup):
        raise ConfigError(f"the default group is {group!r}: init_process_group with backend 'elastic' comes first")
    while True:
        try:
            with group.guard():
                return step()
        except EpochChanged:
            group.reconfigure()
            forget_step(model)


def forget_step(model: nn.Module) -> None:
    """Forget what a step that was broken off has left in `model`, so that it can be repeated. On all ranks alike.

    All gradients are dropped, those accumulated under `no_sync` too. DDP's reducer keeps the number of ranks by which
    it divides, and the order in which it has seen gradients come, until a backward pass ends; the broken one never did.
    Without this the next mean would be over the old ranks, and after a loss in the first step DDP would not go on.
    Buffers (batch norm's statistics) and random numbers stay as the broken step left them.
    """
    for parameter in model.parameters():
        parameter.grad = None
    if isinstance(model, DistributedDataParallel):
        model.reducer._reset_state()


def flat_view(tensor: Tensor) -> Tensor:
    """The elements of a contiguous tensor one after the other, sharing its memory."""
    if not tensor.is_contiguous():
        raise ConfigError(f"an output of shape {tuple(tensor.shape)} is not contiguous: pass one that is")
    return tensor.detach().view(-1)


def _equal_parts(flat: Tensor, count: int) -> list[Tensor]:
    if flat.numel() % count:
        raise ConfigError(
            f"{flat.numel()} elements cannot be divided among {count} ranks: one side of an all-gather or "
            "reduce-scatter of single tensors has to have as many as all ranks together"
        )
    return list(flat.split(flat.numel() // count)) if flat.numel() else [flat] * count


def _rows(tensor: Tensor, sizes: list[int], count: int) -> list[Tensor]:
    """Parts by rows; `sizes` empty: equal ones."""
    if not sizes:
        if tensor.shape[0] % count:
            raise ConfigError(f"{tensor.shape[0]} rows cannot be divided among {count} ranks: pass split sizes")
        sizes = [tensor.shape[0] // count] * count
    return list(tensor.detach().split(sizes))


def _update_tables(epoch: int) -> None:
    """Have torch translate global ranks as they are now, and count groups anew.

    Ranks that have broken off a step have made different numbers of groups, and other backends go by the name. A group
    may still have members that the world has lost meanwhile; it raises EpochChanged before it is used.
    """
    world = dist.distributed_c10d._world
    default = world.default_pg
    if not isinstance(default, ElasticProcessGroup):
        return
    world.group_count = max(world.group_count, epoch * GROUPS_PER_EPOCH)
    members = default._group.communicator.members
    for group in world.pg_map:
        if isinstance(group, ElasticProcessGroup):
            own = enumerate(group._group.communicator.members)
            world.pg_group_ranks[group] = {members.index(worker): rank for rank, worker in own if worker in members}


def _create(options: "_DistributedBackendOptions", backend_options: object) -> ElasticProcessGroup:
    """What torch.distributed calls for each new group."""
    rank, size = options.group_rank, options.group_size
    fabric = ElasticProcessGroup.fabric
    if fabric is None or fabric.closed:
        joins = isinstance(backend_options, Joining)
        fabric = ElasticProcessGroup.fabric = Fabric(options.store, rank, size, options.timeout, joins=joins)
        communicator = fabric.world(options.group_id or "default")
    else:
        communicator = fabric.gather(options.global_ranks_in_group, options.timeout)
    group = Group(
        fabric.endpoint,
        communicator,
        options.timeout.total_seconds(),
        arena_bytes=ARENA_BYTES if fabric.shares_memory(communicator) else 0,
        may_share=fabric.may_share,
    )
    return ElasticProcessGroup(group, fabric, options.group_id)


def register() -> None:
    """Make "elastic" known to torch.distributed; once a process."""
    if "elastic" not in dist.Backend.backend_list:
        dist.Backend.register_backend("elastic", _create, extended_api=True, devices=["cpu"])


register()
