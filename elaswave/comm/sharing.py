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
from elaswave.comm.futex import AVAILABLE
from elaswave.core.ids import WorkerId
from elaswave.errors import ElasWaveError


class Sharing:
    """Belongs to one communicator on one rank; used by its collectives only, one after the other."""

    def __init__(self, communicator: Communicator, arena_bytes: int) -> None:
        """arena_bytes: 0 where memory is not shared."""
        self._communicator = communicator
        self._arena_bytes = arena_bytes if AVAILABLE else 0
        self._own: Arena | None = None
        self._opened: dict[WorkerId, Tensor] = {}
        self._epoch = -1
        self._arenas: Arenas | None = None

    @property
    def wanted(self) -> bool:
        """Memory is shared, or will be, unless some rank turns out to have none; the same on all ranks."""
        return self._arena_bytes > 0

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
        failed = torch.zeros(2, dtype=torch.int64)  # whether somebody has no memory, and the last barrier of anybody
        try:
            self._own = self._own or Arena(self._arena_bytes)
            path = self._own.path.encode()
            paths[rank, : len(path)] = torch.frombuffer(bytearray(path), dtype=torch.uint8)
        except ElasWaveError:
            failed[0] = 1  # all use links then
        yield from tree_all_reduce(rank, size, paths.view(-1), maximum)
        try:
            for place, worker in enumerate(members):
                self._open(worker, bytes(paths[place].tolist()).rstrip(b"\0").decode())
            failed[1] = int(self._opened[self._communicator.me][:8].view(torch.int64))
        except ElasWaveError:
            failed[0] = 1
        yield from tree_all_reduce(rank, size, failed, maximum)
        self._epoch = epoch
        arenas = [self._opened[worker] for worker in members] if not int(failed[0]) else []
        self._arenas = Arenas(rank, arenas, int(failed[1])) if arenas else None

    def _open(self, worker: WorkerId, path: str) -> None:
        if worker in self._opened:
            return
        own = self._own.tensor if self._own is not None and worker == self._communicator.me else None
        self._opened[worker] = open_arena(path, self._arena_bytes) if own is None else own

    def close(self) -> None:
        """Let go of the memory."""
        if self._own is not None:
            self._own.close()
        self._opened.clear()
        self._arenas = None
