"""Edits of native communicators: what all ranks' steps come to, played on a model of the library."""

from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from elaswave.core.ids import WorkerId
from elaswave.core.native_edits import (
    Abort,
    AwaitAsyncError,
    Grow,
    Initialise,
    MemberChange,
    NativeAbilities,
    NativeStep,
    Revoke,
    Shrink,
    abilities_of,
    change_of,
    plan_edit,
)
from elaswave.errors import InvariantError

ABILITIES = st.builds(NativeAbilities, shrink=st.booleans(), revoke=st.booleans(), grow=st.booleans())
WORKERS = st.sets(st.integers(0, 12).map(WorkerId), max_size=8)


@st.composite
def changes(draw: st.DrawFn) -> MemberChange:
    before, after = draw(WORKERS), draw(WORKERS.filter(bool))
    return change_of(before, after, planned=draw(st.booleans()))


@dataclass
class Rank:
    """What one rank's library knows: members of each communicator in the order of ranks, and what was done to it."""

    me: WorkerId
    abilities: NativeAbilities
    members: list[tuple[WorkerId, ...] | None]
    whole: set[int] = field(default_factory=lambda: {0})
    revoked: set[int] = field(default_factory=set)
    aborted: list[int] = field(default_factory=list)
    made_by: list[str] = field(default_factory=list)

    def of(self, number: int) -> tuple[WorkerId, ...]:
        found = self.members[number]
        assert found is not None, "there is one"
        assert number not in self.aborted, "it was not aborted"
        return found

    def take(self, step: NativeStep, change: MemberChange) -> None:
        match step:
            case Revoke(of=of):
                assert self.abilities.revoke
                assert self.of(of)
                self.revoked.add(of)
            case AwaitAsyncError(of=of):
                assert self.of(of)
                self.whole.add(of)
            case Shrink(of=of, excluded=excluded, abort_in_flight=in_flight):
                assert self.abilities.shrink
                assert change.planned or in_flight or of in self.revoked, "operations may be under way"
                rest = tuple(worker for rank, worker in enumerate(self.of(of)) if rank not in excluded)
                assert self.me in rest, "who is excluded does not call"
                self.made("shrink", rest)
            case Grow(of=of, size=size, rank=rank):
                assert self.abilities.grow
                parent = change.kept if of is None else self.of(of)
                assert (of is None) == (rank is not None) == (self.me in change.added)
                grown = (*parent, *change.added)  # a library puts who joins behind
                assert len(grown) == size
                assert rank is None or grown[rank] == self.me
                self.made("grow", grown)
            case Initialise(size=size, rank=rank):
                assert size == len(change.after)
                assert change.after[rank] == self.me
                self.made("init", change.after)
            case Abort(of=of):
                assert self.of(of)
                assert self.me not in change.after or len(self.members) == 1 or len(self.members) - 1 in self.whole
                self.aborted.append(of)

    def made(self, how: str, members: tuple[WorkerId, ...]) -> None:
        self.members.append(members)
        self.made_by.append(how)


def play(abilities: NativeAbilities, change: MemberChange, me: WorkerId) -> Rank:
    rank = Rank(me=me, abilities=abilities, members=[change.before if me in change.before else None])
    for step in plan_edit(abilities, change, me):
        rank.take(step, change)
    return rank


@given(abilities=ABILITIES, change=changes())
def test_every_rank_ends_with_the_wanted_members_and_all_others_aborted(
    abilities: NativeAbilities, change: MemberChange
) -> None:
    for me in change.after:
        rank = play(abilities, change, me)
        last = len(rank.members) - 1
        assert rank.members[last] == change.after
        assert last in rank.whole
        there = {number for number, members in enumerate(rank.members) if members is not None}
        assert sorted(rank.aborted) == sorted(there - {last}), "each once"


@given(abilities=ABILITIES, change=changes())
def test_ranks_meet_in_the_same_calls(abilities: NativeAbilities, change: MemberChange) -> None:
    ways = {me: tuple(play(abilities, change, me).made_by) for me in change.after}
    assert len({ways[me] for me in change.kept}) <= 1
    for me in change.added:
        assert "shrink" not in ways[me], "who joins has nothing to shrink"
        for kept in change.kept:
            assert ways[kept][-1:] == ways[me][-1:], "the last call is one of all ranks"
    roots = [me for me in change.after for step in plan_edit(abilities, change, me) if getattr(step, "root", False)]
    grows = any("grow" in way for way in ways.values())
    assert roots == ([change.after[0]] if grows else []), "one rank tells the unique id, and it was a member before"
    assert not grows or change.after[0] in change.kept


@given(abilities=ABILITIES, change=changes())
def test_who_is_removed_aborts_and_calls_nothing_else(abilities: NativeAbilities, change: MemberChange) -> None:
    for me in change.removed:
        assert plan_edit(abilities, change, me) == (Abort(of=0),)


def test_a_loss_with_a_new_library() -> None:
    change = change_of(map(WorkerId, range(4)), map(WorkerId, (0, 2, 3)))
    assert plan_edit(NativeAbilities(shrink=True, revoke=True), change, WorkerId(2)) == (
        Revoke(of=0),
        AwaitAsyncError(of=0),
        Shrink(of=0, excluded=(1,), abort_in_flight=False),
        AwaitAsyncError(of=0),
        AwaitAsyncError(of=1),
        Abort(of=0),
    )


def test_a_loss_with_an_old_library_aborts_first() -> None:
    change = change_of(map(WorkerId, range(3)), map(WorkerId, (0, 2)))
    assert plan_edit(NativeAbilities(), change, WorkerId(2)) == (
        Abort(of=0),
        Initialise(size=2, rank=1),
        AwaitAsyncError(of=1),
    )


@pytest.mark.parametrize(
    ("library", "version", "calls"),
    [
        ("nccl", (2, 27, 2), ""),
        ("nccl", (2, 27, 3), "shrink"),
        ("nccl", (2, 28, 7), "shrink revoke"),
        ("nccl", (2, 29, 2), "shrink revoke grow"),
        ("rccl", (2, 27, 7), ""),
        ("rccl", (2, 28, 3), "shrink"),
        ("rccl", (2, 30, 4), "shrink revoke grow"),
    ],
)
def test_abilities_go_with_the_version(library: str, version: tuple[int, int, int], calls: str) -> None:
    found = abilities_of("nccl" if library == "nccl" else "rccl", version)
    assert {name for name in ("shrink", "revoke", "grow") if getattr(found, name)} == set(calls.split())


def test_members_that_are_not_in_order_are_a_bug() -> None:
    with pytest.raises(InvariantError, match="ascending"):
        MemberChange(before=(WorkerId(1), WorkerId(0)), after=())
    with pytest.raises(InvariantError, match="worker 7"):
        plan_edit(NativeAbilities(), change_of([], [WorkerId(1)]), WorkerId(7))
