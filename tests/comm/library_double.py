"""A double of NCCL in one process: it moves no data between devices, but refuses what the real library does not allow.

Threads play ranks. A communicator is whole once all of its ranks have called; until then it is in progress.
"""

import threading
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from elaswave.core.native_edits import NativeAbilities
from elaswave.errors import PeerError


@dataclass(eq=False)
class Party:
    """A communicator as all of its ranks have it."""

    size: int
    called: set[int] = field(default_factory=set)
    sums: dict[int, tuple[Tensor, set[int]]] = field(default_factory=dict)


@dataclass(eq=False)
class Handle:
    """A communicator as one rank has it."""

    party: Party
    rank: int
    revoked: bool = False
    aborted: bool = False
    operations: int = 0


class World:
    """What the libraries of all ranks share."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.parties: dict[object, Party] = {}
        self.identities = 0
        self.for_growth: set[bytes] = set()
        self.refused: list[str] = []

    def require(self, condition: bool, why: str) -> None:
        """Refuse a call; kept too, since threads of builds keep what is raised in them to themselves."""
        if not condition:
            self.refused.append(why)
            raise AssertionError(why)

    def join(self, key: object, size: int, rank: int) -> Handle:
        with self.lock:
            party = self.parties.setdefault(key, Party(size))
            assert party.size == size, "all ranks give the same size"
            assert rank not in party.called, "each rank calls once"
            assert 0 <= rank < size
            party.called.add(rank)
            return Handle(party=party, rank=rank)


class LibraryDouble:
    """The library of one rank."""

    def __init__(self, world: World, abilities: NativeAbilities) -> None:
        self.abilities = abilities
        self.handles: list[Handle] = []
        self.calls: list[str] = []
        self._world = world

    def unique_id(self, parent: Handle | None) -> bytes:
        if parent is not None:
            assert self.abilities.grow
            self._check(parent)
        with self._world.lock:
            self._world.identities += 1
            identity = self._world.identities.to_bytes(16, "little")
            if parent is not None:
                self._world.for_growth.add(identity)
            return identity

    def init_rank(self, size: int, rank: int, unique_id: bytes) -> Handle:
        self.calls.append("init")
        self._world.require(unique_id not in self._world.for_growth, "a unique id to grow with is none to init with")
        return self._made(self._world.join(unique_id, size, rank))

    def shrink(self, parent: Handle, excluded: tuple[int, ...], *, abort_in_flight: bool) -> Handle:
        self.calls.append("shrink")
        assert self.abilities.shrink
        self._check(parent)
        assert parent.rank not in excluded
        parent.revoked |= abort_in_flight
        key = (parent.party, "without", excluded)
        rank = parent.rank - sum(other < parent.rank for other in excluded)
        return self._made(self._world.join(key, parent.party.size - len(excluded), rank))

    def revoke(self, communicator: Handle) -> None:
        self.calls.append("revoke")
        assert self.abilities.revoke
        self._check(communicator)
        communicator.revoked = True

    def grow(self, parent: Handle | None, size: int, rank: int | None, unique_id: bytes | None) -> Handle:
        self.calls.append("grow")
        assert self.abilities.grow
        if parent is None:
            assert rank is not None
            assert unique_id is not None
            self._world.require(unique_id in self._world.for_growth, "a unique id to init with is none to grow with")
            return self._made(self._world.join(unique_id, size, rank))
        self._check(parent)
        assert rank is None, "members keep theirs"
        assert (unique_id is not None) == (parent.rank == 0), "the root gives it"
        with self._world.lock:
            identity = self._world.identities.to_bytes(16, "little")
        return self._made(self._world.join(identity, size, parent.rank))

    def in_progress(self, communicator: Handle) -> bool:
        self._check(communicator)
        with self._world.lock:
            return len(communicator.party.called) < communicator.party.size

    def abort(self, communicator: Handle) -> None:
        self.calls.append("abort")
        self._check(communicator)
        communicator.aborted = True

    def all_reduce(self, communicator: Handle, tensor: Tensor) -> Callable[[], bool]:
        self._check(communicator)
        if communicator.revoked:
            raise PeerError("the communicator was revoked")
        party, number = communicator.party, communicator.operations
        communicator.operations += 1
        with self._world.lock:
            total, given = party.sums.setdefault(number, (torch.zeros_like(tensor), set()))
            total += tensor
            given.add(communicator.rank)

        def has_ended() -> bool:
            with self._world.lock:
                if len(given) < party.size:
                    return False
                tensor.copy_(total)
                return True

        return has_ended

    def _made(self, handle: Handle) -> Handle:
        self.handles.append(handle)
        return handle

    def _check(self, communicator: Handle) -> None:
        self._world.require(not communicator.aborted, "nothing is called on a communicator that was aborted")
