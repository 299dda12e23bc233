"""Group: collectives on tensors of any shape and dtype for one communicator."""

import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from elaswave.comm.collectives.commands import Collective
from elaswave.comm.collectives.composed import acknowledged, broadcast, reduce
from elaswave.comm.collectives.direct import direct_exchange, direct_gather, direct_scatter
from elaswave.comm.collectives.grid import grid_all_gather, grid_all_reduce, grid_reduce_scatter, halved_all_reduce
from elaswave.comm.collectives.reduction import Combine, add, split, whole_of
from elaswave.comm.collectives.shared_memory import shared_all_gather, shared_all_reduce, shared_reduce_scatter
from elaswave.comm.collectives.tree import tree_all_gather, tree_all_reduce, tree_barrier
from elaswave.comm.communicator import KEEP_LIMIT_BYTES, Communicator
from elaswave.comm.endpoint import Endpoint
from elaswave.comm.operation import Operation
from elaswave.comm.sharing import Sharing

# Milliseconds of all-reduces by TCP over loopback: what all ranks together compute, divided by the 2 cores they share.
# Medians of python benchmarks/algorithms.py --ranks N --sizes 64KB,256KB,1MB,4MB,16MB, on a loaded machine.
#
#   ranks, size   tree   halves   grid   direct
#    8,  64 KB       3        -      9       13
#    8, 256 KB       4        7     14        -
#    8,   1 MB      11       11     17       23
#    8,   4 MB      34       32     36       40
#    8,  16 MB       -      120    115      122
#   16, 256 KB      10       18     40        -
#   16,   1 MB      30       25     45        -
#   16,   4 MB       -       82    110      133
#   16,  16 MB       -      357    276      320
#   32, 256 KB      24        -    112        -
#   32,   1 MB      60        -    126        -
#
# A tree's root works while the others wait: at 1 MB one tree takes twice the time of two, at 4 MB two that of a grid.
TREE_LIMIT_BYTES = 256 << 10
"""Results up to this go through one tree, in the fewest frames."""

GATHER_TREE_LIMIT_BYTES = 512 << 10
"""The same for all-gathers, which send less on the way up. At 1 MB a grid takes the same time, and no rank sends more
than its share."""

_NOTHING = torch.empty(0)
Finish = Callable[[], object]


class Group:
    """Every method starts an operation and returns it; until it has ended its arguments must not change.

    Results do not depend on the order of arrival. Where an operation fails, tensors that it writes to are undefined.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        communicator: Communicator,
        timeout_s: float,
        *,
        arena_bytes: int = 0,
        may_share: bool = True,
    ) -> None:
        """timeout_s: limit of one operation. arena_bytes: shared memory of a rank; 0: ranks are on several hosts.

        may_share: False where this rank was told to keep to links, so that all of the group have to.
        """
        self.endpoint = endpoint
        self.communicator = communicator
        self.timeout_s = timeout_s
        self._sharing = Sharing(communicator, arena_bytes, may_share=may_share)

    def all_reduce(self, tensor: Tensor, combine: Combine = add, finish: Finish | None = None) -> Operation:
        """`tensor` becomes the combination over all ranks; then `finish` is called."""
        rank, size = self._place()
        flat = flat_of(tensor)
        if flat.nbytes <= KEEP_LIMIT_BYTES and not self._sharing.wanted:
            chosen = tree_all_reduce if flat.nbytes <= TREE_LIMIT_BYTES else halved_all_reduce
            collective = chosen(rank, size, flat, combine)
            return self._start("all_reduce", collective, [(tensor, flat)], finish, result=flat)
        collective = self._sharing.choose(
            lambda arenas: shared_all_reduce(arenas, flat, combine),
            lambda: grid_all_reduce(rank, size, flat, combine),
        )
        return self._start("all_reduce", collective, [(tensor, flat)], finish, catch_up=self._sharing.catch_up)

    def reduce_scatter(
        self, output: Tensor, inputs: Sequence[Tensor], combine: Combine = add, finish: Finish | None = None
    ) -> Operation:
        """`output` becomes the combination of `inputs[rank]` over all ranks; lengths of inputs may differ."""
        rank, size = self._place()
        flats = [flat_of(tensor) for tensor in inputs]
        if sum(flat.nbytes for flat in flats) <= TREE_LIMIT_BYTES and not self._sharing.wanted:
            whole = torch.cat(flats)  # partial sums are not for the arguments
            own = split(whole, [flat.numel() for flat in flats])[rank]
            collective = tree_all_reduce(rank, size, whole, combine)
            return self._start("reduce_scatter", collective, [(output, own)], finish, result=whole)
        total = torch.empty_like(flats[rank])
        collective = self._sharing.choose(
            lambda arenas: shared_reduce_scatter(arenas, total, flats, combine),
            lambda: _linked_reduce_scatter(rank, total, flats, combine),
        )
        catch_up = self._sharing.catch_up
        return self._start("reduce_scatter", collective, [(output, total)], finish, catch_up=catch_up)

    def all_gather(self, outputs: Sequence[Tensor], given: Tensor) -> Operation:
        """`outputs[r]` becomes what rank r has given; lengths may differ."""
        rank, _ = self._place()
        if sum(tensor.nbytes for tensor in outputs) <= KEEP_LIMIT_BYTES and not self._sharing.wanted:
            return self._gather_kept(outputs, given)
        flats = [flat_of(tensor) for tensor in outputs]
        flats[rank].copy_(given.detach().reshape(-1))
        collective = self._sharing.choose(
            lambda arenas: shared_all_gather(arenas, flats), lambda: grid_all_gather(rank, flats)
        )
        written = list(zip(outputs, flats, strict=True))
        return self._start("all_gather", collective, written, catch_up=self._sharing.catch_up)

    def _gather_kept(self, outputs: Sequence[Tensor], given: Tensor) -> Operation:
        rank, _ = self._place()
        lengths = [tensor.numel() for tensor in outputs]
        whole = whole_of(outputs)
        flats = split(whole, lengths)
        flats[rank].copy_(given.detach().reshape(-1))
        small = whole.nbytes <= GATHER_TREE_LIMIT_BYTES
        collective = tree_all_gather(rank, whole, lengths) if small else grid_all_gather(rank, flats, whole)
        return self._start("all_gather", collective, list(zip(outputs, flats, strict=True)), result=whole)

    def broadcast(self, tensor: Tensor, root: int) -> Operation:
        """`tensor` becomes that of the root."""
        rank, size = self._place()
        flat = flat_of(tensor)
        collective = broadcast(rank, size, root, flat)
        if flat.nbytes <= KEEP_LIMIT_BYTES:
            return self._start("broadcast", collective, [(tensor, flat)], result=flat)
        return self._start("broadcast", acknowledged(rank, size, collective), [(tensor, flat)])

    def reduce(self, tensor: Tensor, root: int, combine: Combine = add, finish: Finish | None = None) -> Operation:
        """`tensor` of the root becomes the combination over all ranks; elsewhere it stays."""
        rank, size = self._place()
        flat = tensor.detach().reshape(-1).clone()
        collective = acknowledged(rank, size, reduce(rank, size, root, flat, combine))
        return self._start("reduce", collective, [(tensor, flat)] if rank == root else [], finish)

    def scatter(self, output: Tensor, inputs: Sequence[Tensor], root: int) -> Operation:
        """`output` becomes `inputs[rank]` of the root; elsewhere `inputs` is empty."""
        rank, size = self._place()
        flat = flat_of(output)
        given = [flat_of(tensor) for tensor in inputs]
        collective = acknowledged(rank, size, direct_scatter(rank, root, given, flat))
        return self._start("scatter", collective, [(output, flat)])

    def gather(self, outputs: Sequence[Tensor], given: Tensor, root: int) -> Operation:
        """`outputs[r]` of the root becomes what rank r has given; elsewhere `outputs` is empty."""
        rank, size = self._place()
        flats = [flat_of(tensor) for tensor in outputs]
        collective = acknowledged(rank, size, direct_gather(rank, root, flat_of(given), flats))
        return self._start("gather", collective, list(zip(outputs, flats, strict=True)))

    def all_to_all(self, outputs: Sequence[Tensor], inputs: Sequence[Tensor]) -> Operation:
        """`outputs[r]` becomes `inputs[rank]` of rank r; lengths may differ."""
        rank, size = self._place()
        flats = [flat_of(tensor) for tensor in outputs]
        given = [flat_of(tensor) for tensor in inputs]
        collective = acknowledged(rank, size, direct_exchange(rank, given, flats))
        return self._start("all_to_all", collective, list(zip(outputs, flats, strict=True)))

    def barrier(self) -> Operation:
        """Nobody's ends before everybody has started it."""
        rank, size = self._place()
        return self._start("barrier", tree_barrier(rank, size, _NOTHING), [], result=_NOTHING)

    def close(self) -> None:
        """Let go of shared memory. Nothing is under way any more, and nothing is started."""
        self._sharing.close()

    def _place(self) -> tuple[int, int]:
        return self.communicator.rank, self.communicator.size

    def _start(
        self,
        name: str,
        collective: Collective,
        written: list[tuple[Tensor, Tensor]],
        finish: Finish | None = None,
        *,
        result: Tensor | None = None,
        catch_up: Callable[[], None] | None = None,
    ) -> Operation:
        """Start it; at its end what was computed on flat copies is written to the tensors."""
        operation = Operation(name, collective, time.monotonic() + self.timeout_s, result, keep=result is not None)

        def end(ended: Operation) -> None:
            if ended.error is None:
                for tensor, flat in written:
                    if tensor is not flat and tensor.data_ptr() != flat.data_ptr():
                        tensor.detach().copy_(flat.view(tensor.shape))
                if finish is not None:
                    finish()

        operation.before_end = end
        operation.catch_up = catch_up
        self.endpoint.start(self.communicator, operation)
        return operation


def _linked_reduce_scatter(rank: int, output: Tensor, inputs: Sequence[Tensor], combine: Combine) -> Collective:
    lengths = [tensor.numel() for tensor in inputs]
    whole = torch.cat(list(inputs))  # partial sums are not for the arguments
    yield from grid_reduce_scatter(rank, whole, lengths, combine)
    output.copy_(split(whole, lengths)[rank])


def flat_of(tensor: Tensor) -> Tensor:
    """The elements one after the other: itself or a view where that is possible, else a copy."""
    if type(tensor) is Tensor and tensor.dim() == 1 and tensor.is_contiguous() and not tensor.requires_grad:
        return tensor
    return tensor.detach().contiguous().view(-1)
