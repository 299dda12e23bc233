"""What the ranks of the tests of the process group do; each runs in a process forked by process_group_nursery.py."""

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from pytest import raises
from torch import Tensor, nn
from torch.distributed import _functional_collectives as functional
from torch.distributed import checkpoint
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_module, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from elaswave.comm.communicator import AGREEMENT, Communicator
from elaswave.comm.process_group import ElasticProcessGroup, forget_step
from elaswave.core.ids import WorkerId
from elaswave.errors import ConfigError, DeadlineExceeded, EpochChanged, LinkClosed, ProtocolError

LIMIT_S = 20.0
"""Of one operation; far beyond what anything here takes."""

IN_AGREEMENT = -1
"""Frames after which a rank dies: just before it says anything about another rank's loss."""

STEPS = 5
WIDTH = 96  # 9216 weights of float64 go round a ring


@dataclass(frozen=True, kw_only=True)
class Place:
    rank: int
    size: int
    folder: Path
    arguments: dict[str, Any]


Job = Callable[[Place], object]
JOBS: dict[str, Job] = {}


def job(function: Job) -> Job:
    JOBS[function.__name__] = function
    return function


@contextmanager
def joined(place: Place, limit_s: float = LIMIT_S) -> Iterator[ElasticProcessGroup]:
    """The default group."""
    store = dist.FileStore(str(place.folder / "store"), place.size)
    dist.init_process_group(
        "elastic", store=store, rank=place.rank, world_size=place.size, timeout=timedelta(seconds=limit_s)
    )
    group = dist.group.WORLD
    assert isinstance(group, ElasticProcessGroup)
    yield group
    dist.destroy_process_group()


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def die_after(group: ElasticProcessGroup, frames: int) -> None:
    """SIGKILL this process once it has sent so many frames of a collective."""
    communicator = group._group.communicator
    transmit = communicator._transmit
    sent = 0

    def counted(member: WorkerId, found: Communicator, number: int, tensor: Tensor) -> None:
        nonlocal sent
        if sent == frames or (frames == IN_AGREEMENT and number == AGREEMENT):
            die()
        transmit(member, found, number, tensor)
        sent += 1

    communicator._transmit = counted


# ---------------------------------------------------------------------- collectives

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.bool, torch.complex64)
SHAPES: tuple[tuple[int, ...], ...] = ((), (1,), (5, 7), (0,), (3, 0), (400, 60))


def made(rank: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Small integers, so that every sum is exact; matrices are not contiguous."""
    turned = (shape[1], shape[0]) if len(shape) == 2 else shape
    count = torch.Size(turned).numel()
    found = ((torch.arange(count) * 3 + rank * 7) % 5 - int(dtype != torch.bool)).to(dtype).view(turned)
    return found.t() if len(shape) == 2 else found


def same(found: Tensor, expected: Tensor, what: object = "") -> None:
    assert found.dtype == expected.dtype and found.shape == expected.shape, what
    assert torch.equal(found, expected), (what, found, expected)


def reductions(dtype: torch.dtype) -> dict[object, Callable[[Tensor], Tensor]]:
    """What each reduce operator makes of the stacked contributions of all ranks."""
    if dtype == torch.bool:
        return {dist.ReduceOp.SUM: lambda every: every.any(0), dist.ReduceOp.MIN: lambda every: every.all(0)}
    found: dict[object, Callable[[Tensor], Tensor]] = {dist.ReduceOp.SUM: lambda every: every.sum(0)}
    if dtype == torch.int64:
        found[dist.ReduceOp.AVG] = lambda every: every.sum(0) // len(every)
        found[dist.ReduceOp.BXOR] = lambda every: every[0] ^ every[1] ^ every[2] ^ every[3]
    else:
        found[dist.ReduceOp.AVG] = lambda every: every.sum(0) / len(every)
    if not dtype.is_complex:  # torch itself refuses these for complex numbers
        found[dist.ReduceOp.MAX] = lambda every: every.amax(0)
        found[dist.ReduceOp.PRODUCT] = lambda every: every.prod(0)
    return found


@job
def reduce_everything(place: Place) -> object:
    count = 0
    with joined(place):
        for dtype in DTYPES:
            for shape in SHAPES:
                stacked = torch.stack([made(rank, shape, dtype) for rank in range(place.size)])
                for operator, reduced in reductions(dtype).items():
                    what, expected = (dtype, shape, operator), reduced(stacked)
                    tensor = made(place.rank, shape, dtype)
                    dist.all_reduce(tensor, operator)
                    same(tensor, expected, what)
                    tensor = made(place.rank, shape, dtype)
                    work = dist.reduce(tensor, place.size - 1, operator, async_op=True)
                    work.wait()
                    same(tensor, expected if place.rank == place.size - 1 else made(place.rank, shape, dtype), what)
                    output = torch.empty_like(tensor)
                    inputs = [made(place.rank + 2 * other, shape, dtype) for other in range(place.size)]
                    dist.reduce_scatter(output, inputs, operator)
                    given = [made(other + 2 * place.rank, shape, dtype) for other in range(place.size)]
                    same(output, reduced(torch.stack(given)), what)
                    count += 1
        # refused before anything is sent, so that nothing is left half done
        for dtype, operator in ((torch.float32, dist.ReduceOp.BAND), (torch.float8_e4m3fn, dist.ReduceOp.SUM)):
            with raises(ConfigError, match="not defined for"):
                dist.all_reduce(torch.ones(3).to(dtype), operator)
        dist.barrier()
    return count


@job
def move_everything(place: Place) -> object:
    with joined(place):
        for dtype in DTYPES:
            for shape in SHAPES:
                move(place, dtype, shape)
    return True


def move(place: Place, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    rank, size, what = place.rank, place.size, (dtype, shape)
    mine, all_of = made(rank, shape, dtype), [made(other, shape, dtype) for other in range(size)]

    def empty() -> list[Tensor]:
        return [torch.empty_like(mine) for _ in range(size)]

    tensor = mine.clone()
    dist.broadcast(tensor, 2)
    same(tensor, all_of[2], what)
    outputs = empty()
    dist.all_gather(outputs, mine)
    for found, expected in zip(outputs, all_of, strict=True):
        same(found, expected, what)
    outputs = empty()
    dist.gather(mine, outputs if rank == 1 else None, 1)
    if rank == 1:
        same(torch.stack(outputs), torch.stack(all_of), what)
    output = torch.empty_like(mine)
    dist.scatter(output, [made(other + 5, shape, dtype) for other in range(size)] if rank == 3 else None, 3)
    same(output, made(rank + 5, shape, dtype), what)
    outputs = empty()
    dist.all_to_all(outputs, [made(3 * rank + other, shape, dtype) for other in range(size)])
    same(torch.stack(outputs), torch.stack([made(3 * other + rank, shape, dtype) for other in range(size)]), what)
    if not shape:
        return
    joint = torch.empty(size * shape[0], *shape[1:], dtype=dtype)
    dist.all_gather_single(joint, mine)
    same(joint, torch.cat(all_of), what)
    if dtype != torch.bool:
        output = torch.empty(shape, dtype=dtype)
        dist.reduce_scatter_single(output, torch.cat([made(rank + other, shape, dtype) for other in range(size)]))
        same(output, torch.stack([made(rank + other, shape, dtype) for other in range(size)]).sum(0), what)


@job
def uneven_and_objects(place: Place) -> object:
    rank, size = place.rank, place.size
    with joined(place):
        # rank r sends r + other rows to each other, none to itself where both are 0
        rows = [rank + other for other in range(size)]
        given = torch.cat([torch.full((count, 2), 10.0 * rank + other) for other, count in enumerate(rows)])
        output = torch.empty(sum(rows), 2)
        dist.all_to_all_single(output, given, rows, rows)
        same(output, torch.cat([torch.full((count, 2), 10.0 * other + rank) for other, count in enumerate(rows)]))
        even = torch.empty(size)
        dist.all_to_all_single(even, torch.arange(size) + 10.0 * rank)
        same(even, torch.arange(size) * 10.0 + rank)
        outputs = [torch.empty(3 * other, 2) for other in range(size)]
        dist.all_gather(outputs, torch.full((3 * rank, 2), float(rank)))
        same(torch.cat(outputs), torch.cat([torch.full((3 * other, 2), float(other)) for other in range(size)]))

        objects: list[object] = [None] * size
        dist.all_gather_object(objects, {"rank": rank, "text": "x" * (rank * 40_000)})
        assert [found["rank"] for found in objects if isinstance(found, dict)] == list(range(size))
        told: list[object] = [{"from": 1}, [1, 2, 3]] if rank == 1 else [None, None]
        dist.broadcast_object_list(told, 1)
        assert told == [{"from": 1}, [1, 2, 3]]
        got: list[object] = [None]
        dist.scatter_object_list(got, [f"for {other}" for other in range(size)] if rank == 0 else None, 0)
        assert got == [f"for {rank}"]
        gathered: list[object] | None = [None] * size if rank == 2 else None
        dist.gather_object(rank * rank, gathered, 2)
        assert gathered is None or gathered == [other * other for other in range(size)]
        dist.barrier()
    return True


@job
def messages(place: Place) -> object:
    rank, size = place.rank, place.size
    after, before = (rank + 1) % size, (rank - 1) % size
    with joined(place):
        for dtype in DTYPES:
            for shape in SHAPES:
                received = torch.empty_like(made(before, shape, dtype))
                work = dist.irecv(received, before, tag=3)
                assert work is not None
                sent = dist.isend(made(rank, shape, dtype), after, tag=3)
                assert sent is not None
                work.wait()
                sent.wait()
                same(received, made(before, shape, dtype), (dtype, shape))
        tagged = [torch.empty(2), torch.empty(2)]
        for tag in (1, 2):
            dist.send(torch.full((2,), 10.0 * tag + rank), after, tag=tag)
        for tag in (2, 1):
            dist.recv(tagged[tag - 1], before, tag=tag)
        assert [float(found[0]) for found in tagged] == [10.0 + before, 20.0 + before]
        if rank == 0:
            value, sources = torch.empty(1), []
            for _ in range(size - 1):
                source = dist.recv(value, None, tag=9)
                assert int(value) == source
                sources.append(source)
            assert sorted(sources) == list(range(1, size))
        else:
            dist.send(torch.tensor([float(rank)]), 0, tag=9)
        output = torch.empty(4)
        exchange = [
            dist.P2POp(dist.isend, torch.full((4,), float(rank)), after),
            dist.P2POp(dist.irecv, output, before),
        ]
        for found in dist.batch_isend_irecv(exchange):
            found.wait()
        same(output, torch.full((4,), float(before)))
        dist.send_object_list([{"rank": rank}], after)
        objects: list[object] = [None]
        dist.recv_object_list(objects, before)
        assert objects == [{"rank": before}]
        dist.barrier()
    return True


# ---------------------------------------------------------------------- what torch builds upon it


@job
def groups_and_functional_collectives(place: Place) -> object:
    rank, size = place.rank, place.size
    with joined(place):
        even, odd = dist.new_group([0, 2]), dist.new_group([3, 1])
        mine, members = (even, [0, 2]) if rank in (0, 2) else (odd, [1, 3])
        assert dist.get_process_group_ranks(mine) == members
        tensor = torch.full((3,), float(rank))
        dist.all_reduce(tensor, group=mine)
        same(tensor, torch.full((3,), float(sum(members))))
        dist.broadcast(tensor.fill_(rank), members[1], group=mine)
        same(tensor, torch.full((3,), float(members[1])))

        total = functional.all_reduce(torch.full((5,), float(rank)), "avg", dist.group.WORLD)
        same(total + 0, torch.full((5,), 1.5))
        for length in (2, 0):
            joint = functional.all_gather_tensor(torch.full((length,), float(rank)), 0, dist.group.WORLD)
            same(joint + 0, torch.arange(4.0).repeat_interleave(length))
            part = functional.reduce_scatter_single(torch.ones(4 * length), "sum", 0, dist.group.WORLD)
            same(part + 0, torch.full((length,), 4.0))
        many = functional.all_gather_single_coalesced([torch.ones(2), torch.ones(0)], dist.group.WORLD)
        assert [found.numel() for found in many] == [8, 0]
        turned = functional.all_to_all_single(torch.arange(4.0) + 10 * rank, None, None, dist.group.WORLD)
        same(turned + 0, torch.arange(4.0) * 10 + rank)
        with dist._coalescing_manager(async_ops=True) as manager:
            first, second = torch.ones(3), torch.ones(40_000)
            dist.all_reduce(first)
            dist.all_reduce(second)
        manager.wait()
        assert float(first[0]) == float(second[-1]) == size

        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("outer", "inner"))
        whole = torch.arange(60.0).view(10, 6)
        by_rows = distribute_tensor(whole, mesh, [Shard(0), Replicate()])
        by_columns = by_rows.redistribute(mesh, [Shard(1), Shard(0)])
        same(by_columns.full_tensor(), whole)
        product = by_rows @ distribute_tensor(whole.t(), mesh, [Replicate(), Shard(1)])
        same(product.full_tensor(), whole @ whole.t())
        same(DTensor.from_local(whole, mesh, [Partial(), Replicate()]).full_tensor(), 2 * whole)
        dist.destroy_process_group(mine)
        dist.barrier()
    return True


# ---------------------------------------------------------------------- training


def model_of(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(*[nn.Linear(WIDTH, WIDTH, dtype=torch.float64) for _ in range(4)])


def batch_of(worker: int, step: int) -> Tensor:
    generator = torch.Generator().manual_seed(1000 * step + worker)
    return torch.randn(6, WIDTH, dtype=torch.float64, generator=generator)


def loss_of(model: nn.Module, batch: Tensor) -> Tensor:
    return (model(batch) - batch.flip(1)).square().mean()


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)


def oracle(history: list[list[int]]) -> dict[str, Tensor]:
    """Weights after steps whose gradient is the mean over these workers' batches, computed alone."""
    model = model_of()
    optimizer = sgd(model)
    for step, workers in enumerate(history):
        optimizer.zero_grad()
        torch.stack([loss_of(model, batch_of(worker, step)) for worker in workers]).mean().backward()
        optimizer.step()
    return model.state_dict()


def agrees(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert list(found) == list(expected)
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-12, atol=1e-12)


@job
def fsdp2_and_checkpoint(place: Place) -> object:
    with joined(place):
        mesh = init_device_mesh("cpu", (place.size,))
        model = sharded(model_of(), mesh)
        optimizer = sgd(model)
        for step in range(3):
            optimizer.zero_grad()
            loss_of(model, batch_of(place.rank, step)).backward()
            optimizer.step()
        expected = oracle([list(range(place.size))] * 3)
        agrees(full_state(model), expected)
        state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
        checkpoint.save(state, checkpoint_id=str(place.folder / "checkpoint"))
        other = sharded(model_of(seed=1), mesh)
        loaded = {"model": other.state_dict()}
        checkpoint.load(loaded, checkpoint_id=str(place.folder / "checkpoint"))
        other.load_state_dict(loaded["model"])
        agrees(full_state(other), expected)
    return True


def sharded(model: nn.Sequential, mesh: DeviceMesh) -> nn.Sequential:
    for layer in model:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def full_state(model: nn.Module) -> dict[str, Tensor]:
    options = StateDictOptions(full_state_dict=True)
    return {name: tensor.clone() for name, tensor in get_model_state_dict(model, options=options).items()}


def members(group: ElasticProcessGroup) -> list[int]:
    return list(group._group.communicator.members)


class Trainer(Protocol):
    """How a kind of parallel training makes a step, and what it does after a loss."""

    def step(self, worker: int, step: int) -> None: ...

    def lost(self) -> None: ...

    def check(self, history: list[list[int]]) -> None:
        """Compare the weights with those of an undisturbed run, alone, in which these were the members of each step."""


class WithDdp:
    def __init__(self, **options: bool) -> None:
        self.model = DistributedDataParallel(model_of(), bucket_cap_mb=0.1, **options)
        self.optimizer = sgd(self.model)

    def step(self, worker: int, step: int) -> None:
        self.optimizer.zero_grad()
        loss_of(self.model, batch_of(worker, step)).backward()
        self.optimizer.step()

    def lost(self) -> None:
        forget_step(self.model)
        assert all(parameter.grad is None for parameter in self.model.parameters())

    def check(self, history: list[list[int]]) -> None:
        agrees(self.model.module.state_dict(), oracle(history))


class WithFsdp:
    """What the dead rank had is lost: all go back to the full state that each has kept of the step before."""

    def __init__(self) -> None:
        self.kept: tuple[dict[str, Any], dict[str, Any] | None] = (model_of().state_dict(), None)
        self.lost()

    def lost(self) -> None:
        weights, momenta = self.kept
        self.model = sharded(model_of(seed=1), init_device_mesh("cpu", (dist.get_world_size(),)))
        self.optimizer = sgd(self.model)
        options = StateDictOptions(full_state_dict=True)
        set_model_state_dict(self.model, dict(weights), options=options)
        if momenta is not None:
            set_optimizer_state_dict(self.model, self.optimizer, deepcopy(momenta), options=options)

    def step(self, worker: int, step: int) -> None:
        self.optimizer.zero_grad()
        loss_of(self.model, batch_of(worker, step)).backward()
        self.optimizer.step()
        options = StateDictOptions(full_state_dict=True)
        momenta = get_optimizer_state_dict(self.model, self.optimizer, options=options)
        self.kept = full_state(self.model), deepcopy(momenta)

    def check(self, history: list[list[int]]) -> None:
        agrees(full_state(self.model), oracle(history))


class WithDTensor:
    """Replicated weights and one batch in shards, whoever is there: an undisturbed run alone is the same."""

    def __init__(self) -> None:
        self.weights = model_of().state_dict()
        self.lost()

    def lost(self) -> None:
        """A mesh of the survivors, around the weights that each has."""
        self.mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        model = model_of(seed=1)
        model.load_state_dict(self.weights)
        self.model = distribute_module(model, self.mesh)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.05)

    def step(self, worker: int, step: int) -> None:
        batch = distribute_tensor(self.whole(step), self.mesh, [Shard(0)])
        self.optimizer.zero_grad()
        loss_of(self.model, batch).backward()
        for parameter in self.model.parameters():
            gradient = parameter.grad
            assert isinstance(gradient, DTensor)
            parameter.grad = gradient.redistribute(placements=[Replicate()])
        self.optimizer.step()
        self.weights = full_state(self.model)

    def whole(self, step: int) -> Tensor:
        return torch.cat([batch_of(0, step), batch_of(1, step)])

    def check(self, history: list[list[int]]) -> None:
        model = model_of()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        for step in range(len(history)):
            optimizer.zero_grad()
            loss_of(model, self.whole(step)).backward()
            optimizer.step()
        agrees(self.weights, model.state_dict())


TRAINERS: dict[str, Callable[..., Trainer]] = {"ddp": WithDdp, "fsdp2": WithFsdp, "dtensor": WithDTensor}


@job
def trains_on(place: Place) -> object:
    """STEPS steps on whoever is left; returns the members of each. "losses" are [worker, step, frames]."""
    history: list[list[int]] = []
    with joined(place) as group:
        trainer = TRAINERS[place.arguments["trainer"]](**place.arguments.get("options", {}))
        while len(history) < STEPS:
            for worker, step, frames in place.arguments["losses"]:
                if (worker, step) == (place.rank, len(history)):
                    die_after(group, frames)
            try:
                with group.guard():
                    present = members(group)
                    trainer.step(place.rank, len(history))
                history.append(present)
            except EpochChanged:
                group.reconfigure()
                trainer.lost()
        assert dist.get_world_size() == len(history[-1])
        assert dist.get_process_group_ranks(group) == list(range(dist.get_world_size()))
        trainer.check(history)
        dist.barrier()
    return history


# ---------------------------------------------------------------------- leaving


@job
def leave_at_once(place: Place) -> object:
    """Rank 1 has what the barrier gives and is gone before rank 0, the root, tells ranks 2 and 3."""
    rank, size = place.rank, place.size
    store = dist.FileStore(str(place.folder / "left"), size)
    with joined(place) as group:
        dist.all_to_all_single(torch.empty(size), torch.ones(size))  # everybody has links with everybody
        communicator = group._group.communicator
        transmit = communicator._transmit

        def late(member: WorkerId, *frame: object) -> None:
            if member == 2:
                store.wait(["left"], timedelta(seconds=LIMIT_S))
            transmit(member, *frame)

        if rank == 0:
            communicator._transmit = late
        dist.barrier()
    if rank == 1:
        store.set("left", "1")
    return True


@job
def take_what_was_sent(place: Place) -> object:
    """Ranks send a message and are gone before rank 0 takes it; what was not sent is not waited for."""
    rank, size = place.rank, place.size
    store = dist.FileStore(str(place.folder / "left"), size)
    with joined(place) as group:
        if rank:
            dist.send(torch.full((3,), float(rank)), 0)
        else:
            store.wait([f"left{other}" for other in range(1, size)], timedelta(seconds=LIMIT_S))
            last = torch.empty(3)
            dist.recv(last, size - 1)
            assert last[0] == size - 1
            assert {dist.recv(torch.empty(3)) for _ in range(size - 2)} == set(range(1, size - 1))
            with raises(EpochChanged):
                dist.recv(torch.empty(3), 1)
            group.reconfigure()
            assert dist.get_world_size() == 1
    if rank:
        store.set(f"left{rank}", "1")
    return True


# ---------------------------------------------------------------------- ranks that do not answer


def stop() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def fails_at(deadline_s: float, call: Callable[[], object]) -> str:
    """Message of the DeadlineExceeded that it raises at about that time."""
    start = time.monotonic()
    with raises(DeadlineExceeded) as caught:
        call()
    assert deadline_s * 0.9 < time.monotonic() - start < deadline_s + 2.0
    return str(caught.value)


@job
def differ_in_shape(place: Place) -> object:
    """The user's error is told to the user, and no rank is taken for lost because of it."""
    store = dist.FileStore(str(place.folder / "failed"), place.size)
    with joined(place, 1.0) as group:
        dist.barrier()
        # rank 0, the root, gets too much of rank 1; the others wait for rank 0
        with raises((ProtocolError, DeadlineExceeded)) as caught:
            dist.all_reduce(torch.ones(4 if place.rank == 1 else 3))
        assert group.epoch == 0
        store.set(f"failed{place.rank}", "1")
        store.wait([f"failed{rank}" for rank in range(place.size)], timedelta(seconds=LIMIT_S))
        return str(caught.value)


@job
def lose_a_rank_before_a_new_group(place: Place) -> object:
    with joined(place) as group:
        dist.barrier()
        if place.rank == 3:
            die()
        start = time.monotonic()
        with raises(EpochChanged), group.guard():
            dist.new_group([0, 1, 2, 3])
        group.reconfigure()
        assert time.monotonic() - start < LIMIT_S / 2
        mine = dist.new_group([0, 1, 2])
        tensor = torch.full((3,), float(place.rank))
        dist.all_reduce(tensor, group=mine)
        assert tensor[0] == 3.0
        dist.barrier()
    return True


@job
def stopped(place: Place) -> object:
    """Rank 2 is stopped; the others learn its name within the timeout, and go on once it is killed."""
    rank, limit_s = place.rank, 1.0
    store = dist.FileStore(str(place.folder / "pids"), place.size)
    store.set(f"pid{rank}", str(os.getpid()))
    with joined(place, limit_s) as group:
        model = DistributedDataParallel(model_of(), bucket_cap_mb=0.1)
        dist.barrier()
        if rank == 2:
            stop()

        def step() -> None:
            with group.guard():
                loss_of(model, batch_of(rank, 0)).backward()

        calls: dict[str, Callable[[], object]] = {
            "all_reduce": lambda: dist.all_reduce(torch.ones(50_000)),
            "recv": lambda: dist.recv(torch.ones(3), 2),
            "ddp": step,
        }
        said = fails_at(limit_s, calls[place.arguments["call"]])
        if place.arguments["call"] != "recv":
            start = time.monotonic()
            with raises(DeadlineExceeded):
                dist.barrier()  # fails at once: members may be at different operations
            assert time.monotonic() - start < 0.5
        store.set(f"failed{rank}", "1")
        if rank == 0:
            store.wait([f"failed{other}" for other in (0, 1, 3)], timedelta(seconds=LIMIT_S))
            os.kill(int(store.get("pid2")), signal.SIGKILL)
        if place.arguments["call"] == "recv":
            with raises(EpochChanged):
                dist.barrier()
        group.reconfigure()
        forget_step(model)
        step()
        expected = torch.stack([loss_of(model.module, batch_of(other, 0)) for other in (0, 1, 3)]).mean()
        gradients = torch.autograd.grad(expected, list(model.module.parameters()))
        for parameter, gradient in zip(model.module.parameters(), gradients, strict=True):
            torch.testing.assert_close(parameter.grad, gradient, rtol=1e-12, atol=1e-12)
        dist.barrier()
    return said


@job
def stopped_while_agreeing(place: Place) -> object:
    """Rank 1 is killed, and rank 3 stopped before it has heard of that: reconfigure ends within the timeout."""
    rank = place.rank
    store = dist.FileStore(str(place.folder / "pids"), place.size)
    store.set(f"pid{rank}", str(os.getpid()))
    with joined(place, 1.0) as group:
        dist.barrier()
        if rank == 3:
            stop()
        if rank == 1:
            die()
        with raises(EpochChanged):
            dist.recv(torch.ones(3), 1)
        said = fails_at(1.0, group.reconfigure)
        store.set(f"failed{rank}", "1")
        if rank == 0:
            store.wait(["failed0", "failed2"], timedelta(seconds=LIMIT_S))
            os.kill(int(store.get("pid3")), signal.SIGKILL)
        group.reconfigure()
        tensor = torch.full((50_000,), rank + 1.0)
        dist.all_reduce(tensor)
        assert tensor[-1] == 4.0 and dist.get_world_size() == 2
        dist.barrier()
    return said


def serve_store(folder: Path, size: int) -> None:
    """Become the process of a TCPStore."""
    store = dist.TCPStore("127.0.0.1", 0, size + 1, is_master=True, wait_for_workers=False)
    dist.FileStore(str(folder / "port"), size).set("port", f"{store.port} {os.getpid()}")
    signal.pause()


@job
def lose_the_store(place: Place) -> object:
    """The last rank is the store, and is killed; after that no loss can be agreed upon, and everybody learns that."""
    rank, size = place.rank, place.size - 1
    if rank == size:
        serve_store(place.folder, place.size)
    port, pid = (int(word) for word in dist.FileStore(str(place.folder / "port"), place.size).get("port").split())
    store = dist.TCPStore("127.0.0.1", port, size + 1, wait_for_workers=False)
    dist.init_process_group("elastic", store=store, rank=rank, world_size=size, timeout=timedelta(seconds=LIMIT_S))
    group = dist.group.WORLD
    assert isinstance(group, ElasticProcessGroup)
    model = DistributedDataParallel(model_of(), bucket_cap_mb=0.1)
    if rank == 0:
        os.kill(pid, signal.SIGKILL)
    dist.barrier()
    if rank == 1:
        die_after(group, 2)
    start = time.monotonic()
    with raises(LinkClosed, match="store"), group.guard():
        loss_of(model, batch_of(rank, 0)).backward()
    with raises(LinkClosed, match="store"):
        group.reconfigure()
    assert time.monotonic() - start < LIMIT_S / 2
    return True
