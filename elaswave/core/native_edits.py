"""How a vendor's communicator (NCCL, RCCL) follows a change of members: the calls of one rank, in order.

Native ranks are the places of members among ascending worker ids: a shrink keeps their order, and who is admitted
later has a higher id, which is where a grow puts it. So all ranks know all native ranks from the members alone.
See docs/communicators.md, which also says that nothing of it was run on a GPU.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final, Literal

from elaswave.core.ids import WorkerId
from elaswave.errors import InvariantError

NativeLibrary = Literal["nccl", "rccl"]
NativeCall = Literal["shrink", "revoke", "grow"]
NativeVersion = tuple[int, int, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class NativeAbilities:
    """Calls that a library has beside init and abort."""

    shrink: bool = False
    revoke: bool = False
    grow: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class FirstVersion:
    """The first version of a library that is known to have a call, and where that is known from."""

    library: NativeLibrary
    call: NativeCall
    version: NativeVersion
    source: str


FIRST_VERSIONS: Final = (
    FirstVersion(library="nccl", call="shrink", version=(2, 27, 3), source="nccl.h.in of NCCL's tags"),
    FirstVersion(library="nccl", call="revoke", version=(2, 28, 7), source="nccl.h.in of NCCL's tags"),
    FirstVersion(library="nccl", call="grow", version=(2, 29, 2), source="nccl.h.in of NCCL's tags"),
    FirstVersion(library="rccl", call="shrink", version=(2, 28, 3), source="nccl.h.in of RCCL 2.28.3 (ROCm 7.13)"),
    FirstVersion(library="rccl", call="revoke", version=(2, 30, 4), source="RCCL's changelog, ROCm 7.14"),
    FirstVersion(library="rccl", call="grow", version=(2, 30, 4), source="RCCL's changelog, ROCm 7.14"),
)


def abilities_of(library: NativeLibrary, version: NativeVersion) -> NativeAbilities:
    """What a library of this version can do, by FIRST_VERSIONS."""
    calls = {row.call for row in FIRST_VERSIONS if row.library == library and version >= row.version}
    return NativeAbilities(shrink="shrink" in calls, revoke="revoke" in calls, grow="grow" in calls)


@dataclass(frozen=True, slots=True, kw_only=True)
class MemberChange:
    """Members before and after. `before`: those of the communicator to edit, none where there is none.

    planned: no operation is under way on any rank, and whoever is removed is still there. Ascending, without repeats.
    """

    before: tuple[WorkerId, ...]
    after: tuple[WorkerId, ...]
    planned: bool = False

    def __post_init__(self) -> None:
        if any(list(members) != sorted(set(members)) for members in (self.before, self.after)):
            raise InvariantError(f"members {self.before} and {self.after}: must be ascending, each once")

    @property
    def removed(self) -> tuple[WorkerId, ...]:
        return tuple(worker for worker in self.before if worker not in self.after)

    @property
    def added(self) -> tuple[WorkerId, ...]:
        return tuple(worker for worker in self.after if worker not in self.before)

    @property
    def kept(self) -> tuple[WorkerId, ...]:
        return tuple(worker for worker in self.before if worker in self.after)


def change_of(before: Iterable[WorkerId], after: Iterable[WorkerId], *, planned: bool = False) -> MemberChange:
    """The change between members in whatever order."""
    return MemberChange(before=tuple(sorted(before)), after=tuple(sorted(after)), planned=planned)


# ------------------------------------------------------------------ steps


@dataclass(frozen=True, slots=True, kw_only=True)
class Revoke:
    """Stop what is under way on communicator `of`; it is good for edits and abort only from then on."""

    of: int


@dataclass(frozen=True, slots=True, kw_only=True)
class AwaitAsyncError:
    """Ask for the asynchronous error of communicator `of` until it is no longer "in progress"; any other is raised."""

    of: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Shrink:
    """Make the next communicator of `of` without these ranks, which must not call it.

    abort_in_flight: operations may be under way. Resources are never shared with the parent: the two would share their
    abort flag too, and the parent is to be aborted.
    """

    of: int
    excluded: tuple[int, ...]
    abort_in_flight: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Grow:
    """Make the next communicator, of `size` ranks: members of `of` keep theirs, who joins has no `of` but a `rank`.

    Every rank waits until `root`, a member of `of`, has given the unique id of it to all others.
    """

    of: int | None
    size: int
    rank: int | None
    root: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Abort:
    """End communicator `of`, whatever is under way."""

    of: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Initialise:
    """Make the next communicator from nothing; rank 0 gives the unique id to all others."""

    size: int
    rank: int


NativeStep = Revoke | AwaitAsyncError | Shrink | Grow | Abort | Initialise
"""Communicators of an edit are numbered: 0 is the one before, 1 and up those that the steps make, in order."""


def plan_edit(abilities: NativeAbilities, change: MemberChange, me: WorkerId) -> tuple[NativeStep, ...]:
    """Steps of the rank `me`; every rank of `change` has to take its own. The last communicator is the new one.

    Unchanged members: the communicator has failed otherwise, and another one is made. There is no step that destroys
    one: that waits for the other ranks.
    """
    if me not in change.before and me not in change.after:
        raise InvariantError(f"worker {me} is not in {change.before} nor in {change.after}")
    if me not in change.after:
        return (Abort(of=0),)
    if not _can_edit(abilities, change):
        return _from_nothing(change, me)
    if me in change.added:
        return (*_grown(change, me, of=None), AwaitAsyncError(of=1))
    steps: list[NativeStep] = []
    if not change.planned and abilities.revoke:
        steps += [Revoke(of=0), AwaitAsyncError(of=0)]
    last = 0
    if change.removed:
        excluded = tuple(change.before.index(worker) for worker in change.removed)
        in_flight = not change.planned and not abilities.revoke
        steps += [Shrink(of=0, excluded=excluded, abort_in_flight=in_flight)]
        steps += [AwaitAsyncError(of=0), AwaitAsyncError(of=1), Abort(of=0)]
        last = 1
    if change.added:
        steps += [*_grown(change, me, of=last), AwaitAsyncError(of=last + 1), Abort(of=last)]
    return tuple(steps)


def _can_edit(abilities: NativeAbilities, change: MemberChange) -> bool:
    """The same on all ranks. Who joins need not know whether anybody is removed: to grow takes all three calls."""
    if not change.kept or not (change.removed or change.added):
        return False
    if change.added:
        able = abilities.grow and abilities.revoke and abilities.shrink
        return able and min(change.added) > max(change.kept)
    return abilities.shrink


def _grown(change: MemberChange, me: WorkerId, of: int | None) -> tuple[NativeStep, ...]:
    rank = change.after.index(me)
    return (Grow(of=of, size=len(change.after), rank=rank if of is None else None, root=rank == 0),)


def _from_nothing(change: MemberChange, me: WorkerId) -> tuple[NativeStep, ...]:
    # Aborted first: with one left over, the memory of two would be taken at once.
    first: tuple[NativeStep, ...] = (Abort(of=0),) if me in change.before else ()
    return (*first, Initialise(size=len(change.after), rank=change.after.index(me)), AwaitAsyncError(of=1))
