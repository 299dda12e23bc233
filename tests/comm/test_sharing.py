"""Losses in shared memory, all ranks in one process: random walks as over links, and what the walks hit too rarely."""

import os
import random

import pytest
import torch
from torch import Tensor

from elaswave.comm.arena import Arena, open_arena
from elaswave.comm.collectives import shared_memory
from elaswave.comm.collectives.commands import Collective
from elaswave.comm.collectives.grid import grid_all_reduce
from elaswave.comm.collectives.reduction import add
from elaswave.comm.collectives.shared_memory import (
    HEADER_BYTES,
    shared_all_gather,
    shared_all_reduce,
    shared_reduce_scatter,
)
from elaswave.comm.operation import Operation
from elaswave.comm.sharing import Sharing
from elaswave.core.ids import WorkerId
from elaswave.errors import PeerError, ProtocolError
from tests.comm.simulated import Network
from tests.comm.test_communicator import Walk, small

ARENA_BYTES = HEADER_BYTES + 4 * 64
LENGTHS = (5, 40)  # one piece without a second barrier, three pieces with


@pytest.fixture(autouse=True)
def _small_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_memory, "SMALL_BYTES", 32)


class Memories:
    """The arenas of each rank."""

    def __init__(self, network: Network) -> None:
        self._network = network
        self.sharings = {worker: Sharing(found, ARENA_BYTES) for worker, found in network.ranks.items()}

    def all_reduce(self, worker: WorkerId, tensor: Tensor) -> Operation:
        sharing = self.sharings[worker]

        def make(rank: int, size: int, tensor: Tensor) -> Collective:
            return sharing.choose(
                lambda arenas: shared_all_reduce(arenas, tensor, add),
                lambda: grid_all_reduce(rank, size, tensor, add),
            )

        return self._network.start(worker, make, tensor, keep=False, catch_up=sharing.catch_up)

    def all_gather(self, worker: WorkerId, tensor: Tensor) -> Operation:
        """Every rank gives its tensor; `tensor` becomes the sum of all."""
        sharing = self.sharings[worker]
        gathered: list[Tensor] = []

        def add_up() -> None:
            tensor.copy_(torch.stack(gathered).sum(0))

        def make(rank: int, size: int, tensor: Tensor) -> Collective:
            gathered[:] = [torch.zeros_like(tensor) for _ in range(size)]
            gathered[rank].copy_(tensor)
            return collective()

        def collective() -> Collective:
            yield from sharing.choose(lambda arenas: shared_all_gather(arenas, gathered), no_links)
            add_up()

        def catch_up() -> None:
            sharing.catch_up()
            add_up()

        return self._network.start(worker, make, tensor, keep=False, catch_up=catch_up)

    def reduce_scatter(self, worker: WorkerId, tensor: Tensor) -> Operation:
        """Every rank gives the same tensor to each rank; `tensor` becomes the sum of those."""
        sharing = self.sharings[worker]

        def make(rank: int, size: int, tensor: Tensor) -> Collective:
            given = [tensor.clone() for _ in range(size)]
            return sharing.choose(lambda arenas: shared_reduce_scatter(arenas, tensor, given, add), no_links)

        return self._network.start(worker, make, tensor, keep=False, catch_up=sharing.catch_up)

    def close(self) -> None:
        for sharing in self.sharings.values():
            sharing.close()


def no_links() -> Collective:
    raise AssertionError("memory is not used")


class MemoryWalk(Walk):
    """The same walk, in which what is written to memory is seen at any later moment."""

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        self.memories = Memories(self.network)
        shared = (self.memories.all_reduce, self.memories.all_gather, self.memories.reduce_scatter)
        self.kinds = [self.generator.choice((*shared, self._tree)) for _ in range(5)]
        self.lengths = [self.generator.choice(LENGTHS) for _ in range(7)]

    def _deliver(self) -> None:
        if self.generator.random() < 0.5:
            self.network.look(self.generator.choice(sorted(self.network.alive)))
        else:
            self.network.deliver_one()

    def _start(self, worker: WorkerId) -> None:
        index = len(self.results[worker])
        tensor = torch.full((self.lengths[index % 7],), 1.0 + index)
        self.current[worker] = (self.kinds[index % 5](worker, tensor), tensor)

    def _tree(self, worker: WorkerId, tensor: Tensor) -> Operation:
        return self.network.start(worker, small, tensor, keep=True)


@pytest.mark.parametrize("base", range(0, 400, 100))
def test_operations_in_memory_succeed_on_all_survivors_or_on_none(base: int) -> None:
    losses = 0
    for seed in range(base, base + 100):
        walk = MemoryWalk(seed)
        for _ in range(150):
            walk.step()
        walk.finish()
        losses += walk.check()
        walk.memories.close()
    assert losses > 50, "too few losses to show anything"


def gang(size: int) -> tuple[Network, Memories]:
    """Ranks that have used their memory once."""
    network = Network(size, random.Random(0))
    memories = Memories(network)
    everybody = [WorkerId(rank) for rank in range(size)]
    first = [memories.all_reduce(worker, torch.ones(5)) for worker in everybody]
    network.run()
    assert all(operation.finished and operation.error is None for operation in first)
    return network, memories


def lose(network: Network, epoch: int, *gone: int) -> None:
    """The last of them dies now, and everybody hears of it."""
    network.kill(WorkerId(gone[-1]))
    for worker in sorted(network.alive):
        network.edit(worker, epoch, [WorkerId(lost) for lost in gone])


def pass_on(network: Network, sender: int, receiver: int) -> None:
    """What one has sent to the other arrives."""
    frames = network.links[WorkerId(sender), WorkerId(receiver)]
    while frames:
        epoch, number, content = frames.popleft()
        network.ranks[WorkerId(receiver)].receive(WorkerId(sender), epoch, number, content.numpy())


def acknowledge(network: Network) -> None:
    for worker in network.alive:
        network.ranks[worker].acknowledge()


def test_nobody_is_taken_to_be_in_a_barrier_that_was_broken_off(request: pytest.FixtureRequest) -> None:
    network, memories = gang(3)
    request.addfinalizer(memories.close)
    for rank in (0, 1):
        memories.all_reduce(WorkerId(rank), torch.ones(5))  # both wait for rank 2
    lose(network, 1, 2)
    network.run()
    acknowledge(network)
    early, late = torch.full((5,), 5.0), torch.full((5,), 7.0)
    first = memories.all_reduce(WorkerId(0), early)
    network.run()
    assert not first.finished
    memories.all_reduce(WorkerId(1), late)
    network.run()
    assert torch.equal(early, torch.full((5,), 12.0)) and torch.equal(late, early)


def test_what_others_still_have_to_read_is_not_overwritten_in_the_next_epoch(request: pytest.FixtureRequest) -> None:
    network, memories = gang(5)
    request.addfinalizer(memories.close)
    tensors = [torch.full((5,), 1.0 + rank) for rank in range(5)]
    operations = [memories.all_reduce(WorkerId(rank), tensors[rank]) for rank in range(5)]
    network.look(WorkerId(0))  # it alone has seen that all are in
    lose(network, 1, 4)
    for rank in (1, 2, 3):
        pass_on(network, rank, 0)
    pass_on(network, 0, 3)
    assert operations[3].finished and not operations[1].finished
    network.links.clear()
    lose(network, 2, 4, 0)  # now worker 3 is rank 0, the first to know of the agreement
    for rank in (1, 2):
        pass_on(network, rank, 3)
    network.ranks[WorkerId(3)].acknowledge()
    memories.all_reduce(WorkerId(3), torch.full((5,), 99.0))
    network.run()
    for rank in (1, 2, 3):
        assert operations[rank].error is None
        assert torch.equal(tensors[rank], torch.full((5,), 15.0)), tensors


def test_a_loss_costs_no_search_for_memory(request: pytest.FixtureRequest) -> None:
    network, memories = gang(4)
    request.addfinalizer(memories.close)
    lose(network, 1, 1)
    network.run()
    acknowledge(network)
    tensors = {worker: torch.ones(40) for worker in network.alive}
    for worker, tensor in tensors.items():
        memories.all_reduce(worker, tensor)
    assert not any(network.links.values()), "frames were sent"
    network.run()
    assert all(torch.equal(tensor, torch.full((40,), 3.0)) for tensor in tensors.values())


def test_all_gather_goes_on_in_memory_after_a_loss(request: pytest.FixtureRequest) -> None:
    network, memories = gang(4)
    request.addfinalizer(memories.close)
    broken = [memories.all_gather(WorkerId(rank), torch.ones(1)) for rank in range(3)]
    lose(network, 1, 3)
    network.run()
    assert all(operation.error is not None for operation in broken)
    acknowledge(network)
    tensors = [torch.full((1,), 10.0**rank) for rank in range(3)]
    for rank in range(3):
        memories.all_gather(WorkerId(rank), tensors[rank])
    network.run()
    assert [float(tensor) for tensor in tensors] == [111.0] * 3


def test_where_one_rank_has_no_memory_all_use_links(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    network, memories = gang(2)
    request.addfinalizer(memories.close)
    for rank in (0, 1):
        network.ranks[WorkerId(rank)].edit(1, (), [WorkerId(2)], 0.0)
    network.join(WorkerId(2), [WorkerId(rank) for rank in range(3)], 1)
    memories.sharings[WorkerId(2)] = Sharing(network.ranks[WorkerId(2)], ARENA_BYTES)
    network.run()
    acknowledge(network)
    with monkeypatch.context() as patch:
        patch.setattr(os, "memfd_create", refuse)
        tensors = [torch.full((40,), 10.0**rank) for rank in range(3)]
        for rank in range(3):
            memories.all_reduce(WorkerId(rank), tensors[rank])
        network.run()
    assert all(torch.equal(tensor, torch.full((40,), 111.0)) for tensor in tensors)
    assert all(network.ranks[WorkerId(rank)].awaited_memory() is None for rank in range(3))


def refuse(*_: object) -> int:
    raise OSError("too many open files")


@pytest.mark.parametrize("length", LENGTHS)
def test_another_length_is_an_error_on_all_ranks_that_names_both(request: pytest.FixtureRequest, length: int) -> None:
    network, memories = gang(3)
    request.addfinalizer(memories.close)
    tensors = [torch.ones(length + (rank == 1)) for rank in range(3)]
    operations = [memories.all_reduce(WorkerId(rank), tensors[rank]) for rank in range(3)]
    network.run()
    for rank, other in ((0, 1), (1, 0), (2, 1)):
        expected = f"rank {other} works on {4 * len(tensors[other])} bytes, while rank {rank} expects "
        assert isinstance(operations[rank].error, ProtocolError)
        assert expected + str(4 * len(tensors[rank])) in str(operations[rank].error)


def test_an_arena_is_closed_once_whoever_closes_it_at_the_same_time(monkeypatch: pytest.MonkeyPatch) -> None:
    arena, close, closed = Arena(ARENA_BYTES), os.close, []

    def meanwhile(number: int) -> None:
        closed.append(number)
        if len(closed) == 1:
            arena.close()  # as another thread may: a second close would hit a descriptor of somebody else
            close(number)

    with monkeypatch.context() as patch:
        patch.setattr(os, "close", meanwhile)
        arena.close()
    assert len(closed) == 1


def test_only_the_arena_that_was_announced_is_opened() -> None:
    arena = Arena(ARENA_BYTES)
    opened = open_arena(arena.name, ARENA_BYTES)
    arena.tensor[7] = 9
    assert opened[7] == 9
    with pytest.raises(PeerError, match=f"not the shared memory of {ARENA_BYTES + 1} bytes"):
        open_arena(arena.name, ARENA_BYTES + 1)
    number = arena.name.partition("/fd/")[2]
    arena.close()
    other = os.memfd_create("another")
    os.dup2(other, int(number))
    os.ftruncate(int(number), ARENA_BYTES)
    try:
        with pytest.raises(PeerError, match="is not the shared memory"):
            open_arena(arena.name, ARENA_BYTES)
    finally:
        os.close(other)
        if other != int(number):
            os.close(int(number))
    with pytest.raises(PeerError, match="cannot be opened"):
        open_arena(arena.name, ARENA_BYTES)
