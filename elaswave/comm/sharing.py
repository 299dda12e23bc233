"""Sharing: the arenas of a communicator, and the choice between them and links."""

from collections.abc import Callable

import torch
from torch import Tensor

from elaswave.comm.arena import NAME_BYTES, Arena, open_arena
from elaswave.comm.collectives.commands import Collective
from elaswave.comm.collectives.composed import acknowledged
from elaswave.comm.collectives.reduction import maximum
from elaswave.comm.collectives.shared_memory import Arenas, SharedCollective
from elaswave.comm.collectives.tree import tree_all_reduce
from elaswave.comm.communicator import NO_STAKE, Communicator
from elaswave.comm.futex import AVAILABLE
from elaswave.core.ids import WorkerId
from elaswave.errors import ElasWaveError, InvariantError

SKIPPED_TURNS = 2
"""Of a new epoch: its barriers have other numbers than those that were broken off, its slots are the same."""


class Sharing:
    """Belongs to one communicator on one rank; used by its collectives only, one after the other.

    Arenas are found in the first operation, and again where a member has come. Where members have only gone, the rest
    has all it needs: the agreement on the edit finds whether that is so on all ranks, and the last turn of any of them.
    """

    def __init__(self, communicator: Communicator, arena_bytes: int, *, may_share: bool = True) -> None:
        """arena_bytes: 0 where memory is not shared, the same on all ranks. may_share: this rank would have it so."""
        self._may_share = may_share
        self._communicator = communicator
        self._arena_bytes = arena_bytes if AVAILABLE else 0
        self._own: Arena | None = None
        self._opened: dict[WorkerId, tuple[str, Tensor]] = {}
        self._epoch = -1
        self._turns = 0
        self._arenas: Arenas | None = None
        self._chosen: SharedCollective | None = None
        if self._arena_bytes:
            communicator.stake = self._stake

    @property
    def wanted(self) -> bool:
        """Memory is shared, or will be, unless some rank turns out to have none; the same on all ranks."""
        return self._arena_bytes > 0

    def choose(self, shared: Callable[[Arenas], SharedCollective], linked: Callable[[], Collective]) -> Collective:
        """The first where all ranks have all arenas, else the other, which has to be acknowledged."""
        if self._arena_bytes and self._epoch != self._communicator.epoch:
            if self._communicator.stakes < NO_STAKE:
                self._take_up(self._communicator.stakes)
            else:
                # A part of the first operation of an epoch, so that all ranks do it at the same place.
                yield from self._find()
        if self._arenas is None:
            rank, size = self._communicator.rank, self._communicator.size
            yield from acknowledged(rank, size, linked())
            return
        self._chosen = shared(self._arenas)
        yield from self._chosen.collective

    def catch_up(self) -> None:
        """Get the result of the collective under way, which another rank has completed."""
        if self._chosen is None:
            raise InvariantError("another rank has completed an operation in memory that has not begun here")
        self._chosen.catch_up()

    def _stake(self) -> int:
        """The turn that this rank is at, if it has the arenas of all members."""
        if self._arenas is None or not self._opened.keys() >= set(self._communicator.members):
            return NO_STAKE
        return self._arenas.turns

    def _take_up(self, turns: int) -> None:
        """Make the arenas of this epoch of those that are known. turns: the last of any rank."""
        members = self._communicator.members
        self._opened = {worker: self._opened[worker] for worker in members}
        tensors = [tensor for _, tensor in self._opened.values()]
        self._arenas = Arenas(self._communicator.rank, tensors, turns + SKIPPED_TURNS)
        self._epoch = self._communicator.epoch

    def _find(self) -> Collective:
        members, rank, epoch = self._communicator.members, self._communicator.rank, self._communicator.epoch
        if self._arenas is not None:
            # Not those that were found before: a member has come, perhaps one that has no memory.
            self._turns, self._arenas = self._arenas.turns, None
        names = torch.zeros((len(members), NAME_BYTES), dtype=torch.uint8)
        # Whether somebody has no memory, so that all use links, and the last turn of any rank.
        found = torch.tensor([int(not self._may_share), self._turns])
        try:
            if self._may_share:
                self._own = self._own or Arena(self._arena_bytes)
                name = self._own.name.encode()
                names[rank, : len(name)] = torch.frombuffer(bytearray(name), dtype=torch.uint8)
        except ElasWaveError:
            found[0] = 1
        yield from tree_all_reduce(rank, len(members), names.view(-1), maximum)
        try:
            for worker, name in zip(members, names, strict=True):
                self._open(worker, bytes(name.tolist()).rstrip(b"\0").decode())
        except ElasWaveError:
            found[0] = 1
        yield from tree_all_reduce(rank, len(members), found, maximum)
        self._epoch = epoch
        if not int(found[0]):
            self._take_up(int(found[1]))

    def _open(self, worker: WorkerId, name: str) -> None:
        known = self._opened.get(worker)
        if known is not None and known[0] == name:
            return
        mine = self._own is not None and worker == self._communicator.me
        self._opened[worker] = name, self._own.tensor if mine and self._own else open_arena(name, self._arena_bytes)

    def close(self) -> None:
        """Let go of the memory; any thread, once nothing is under way. A second call does nothing."""
        own, self._own, self._arenas, self._chosen = self._own, None, None, None
        if own is not None:
            own.close()
        self._opened.clear()
