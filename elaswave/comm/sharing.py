"""Sharing: the arenas of a communicator, found anew in each epoch, and the choice between them and links."""

from collections.abc import Callable

import torch
from torch import Tensor

from elaswave.comm.arena import PATH_BYTES, Arena, open_arena
from elaswave.comm.collectives.commands import Collective
from elaswave.comm.collectives.reduction import maximum
from elaswave.comm.collectives.shared_memory import Arenas
from elaswave.comm.collectives.tree import tree_all_reduce
from elaswave.comm.communicator import Communicator
from elaswave.core.ids import WorkerId
from elaswave.errors import ElasWaveError


class Sharing:
    """Belongs to one communicator on one rank; used by its collectives only, one after the other."""

    def __init__(self, communicator: Communicator, arena_bytes: int) -> None:
        """arena_bytes: 0 where memory is not shared."""
        self._communicator = communicator
        self._arena_bytes = arena_bytes
        self._own: Arena | None = None
        self._opened: dict[WorkerId, Tensor] = {}
        self._epoch = -1
        self._arenas: Arenas | None = None

    def choose(
        self, shared: Callable[[Arenas], Collective], linked: Callable[[], Collective], used: list[Arenas] | None = None
    ) -> Collective:
        """The first where all ranks have all arenas, else the other. `used` gets the arenas before they are used."""
        if self._arena_bytes and self._epoch != self._communicator.epoch:
            # A part of the first operation of an epoch, so that all ranks do it at the same place.
            yield from self._find()
        if self._arenas is None:
            yield from linked()
            return
        if used is not None:
            used.append(self._arenas)
        yield from shared(self._arenas)

    def _find(self) -> Collective:
        members, rank = self._communicator.members, self._communicator.rank
        size, epoch = len(members), self._communicator.epoch
        paths = torch.zeros((size, PATH_BYTES), dtype=torch.uint8)
        failed = torch.zeros(1, dtype=torch.uint8)
        try:
            self._own = self._own or Arena(self._arena_bytes)
            path = self._own.path.encode()
            paths[rank, : len(path)] = torch.frombuffer(bytearray(path), dtype=torch.uint8)
        except ElasWaveError:
            failed.fill_(1)  # all use links then
        yield from tree_all_reduce(rank, size, paths.view(-1), maximum)
        try:
            for place, worker in enumerate(members):
                self._open(worker, bytes(paths[place].tolist()).rstrip(b"\0").decode())
        except ElasWaveError:
            failed.fill_(1)
        yield from tree_all_reduce(rank, size, failed, maximum)
        self._epoch = epoch
        self._arenas = None if int(failed) else Arenas(rank, [self._opened[worker] for worker in members])

    def _open(self, worker: WorkerId, path: str) -> None:
        if worker in self._opened:
            return
        mine = worker == self._communicator.me and self._own is not None
        self._opened[worker] = self._own.tensor if mine and self._own else open_arena(path, self._arena_bytes)

    def close(self) -> None:
        """Let go of the memory."""
        if self._own is not None:
            self._own.close()
        self._opened.clear()
        self._arenas = None
