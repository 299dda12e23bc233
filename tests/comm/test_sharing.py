"""Losses in shared memory, all ranks in one process: random walks as over links, and what the walks hit too rarely."""

import random

import pytest
import torch
from torch import Tensor

from elaswave.comm.arena import Arena, open_arena
from elaswave.comm.collectives import shared_memory
from elaswave.comm.collectives.commands import Collective
from elaswave.comm.collectives.composed import acknowledged
from elaswave.comm.collectives.reduction import add, even_segments, split
from elaswave.comm.collectives.ring import ring_all_reduce
from elaswave.comm.collectives.shared_memory import (
    HEADER_BYTES,
    Arenas,
    shared_all_gather,
    shared_all_reduce,
    shared_catch_up,
)
from elaswave.comm.operation import Operation
from elaswave.comm.sharing import Sharing
from elaswave.core.ids import WorkerId
from elaswave.errors import PeerError
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
        used: list[Arenas] = []

        def make(rank: int, size: int, tensor: Tensor) -> Collective:
            segments = split(tensor, even_segments(tensor.numel(), size))
            return self.sharings[worker].choose(
                lambda arenas: shared_all_reduce(arenas, tensor, add),
                lambda: acknowledged(rank, size, ring_all_reduce(rank, segments, add)),
                used,
            )

        return self._network.start(
            worker, make, tensor, keep=False, catch_up=lambda: shared_catch_up(used[0], tensor, add)
        )

    def all_gather(self, worker: WorkerId, tensor: Tensor) -> Operation:
        """Every rank gives one element; `tensor` becomes their sum."""

        def make(rank: int, size: int, tensor: Tensor) -> Collective:
            segments = [tensor[:1].clone() for _ in range(size)]

            def collective() -> Collective:
                yield from acknowledged(
                    rank,
                    size,
                    self.sharings[worker].choose(lambda arenas: shared_all_gather(arenas, segments), no_links),
                )
                tensor.fill_(float(sum(segments)))

            return collective()

        return self._network.start(worker, make, tensor, keep=False)

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
        self.kinds = [self.generator.choice(("memory", "memory", "tree")) for _ in range(5)]
        self.lengths = [self.generator.choice(LENGTHS) for _ in range(7)]

    def _deliver(self) -> None:
        if self.generator.random() < 0.5:
            self.network.look(self.generator.choice(sorted(self.network.alive)))
        else:
            self.network.deliver_one()

    def _start(self, worker: WorkerId) -> None:
        index = len(self.results[worker])
        tensor = torch.full((self.lengths[index % 7],), 1.0 + index)
        if self.kinds[index % 5] == "memory":
            operation = self.memories.all_reduce(worker, tensor)
        else:
            operation = self.network.start(worker, small, tensor, keep=True)
        self.current[worker] = (operation, tensor)


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
