"""The roster on a store that several write to."""

import json
from itertools import pairwise

import pytest
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

from elaswave.comm.roster import FIRST, Change, Roster, add, decode_roster, remove
from elaswave.core.ids import WorkerId
from elaswave.errors import ProtocolError


def test_who_was_removed_removes_nobody() -> None:
    """Its links were closed by all others, whom it would otherwise take for lost, one after the other."""
    store = dist.HashStore()
    first = remove(store, FIRST, [WorkerId(2)], by=WorkerId(0))
    assert remove(store, FIRST, [WorkerId(0)], by=WorkerId(2)) == first
    second = remove(store, FIRST, [WorkerId(1)], by=WorkerId(0))
    assert (second.epoch, second.removed) == (2, ((WorkerId(2), 1), (WorkerId(1), 2)))


@st.composite
def histories(draw: st.DrawFn) -> list[Roster]:
    """All rosters of a job that begins with workers 0 to 3."""
    rosters = [FIRST]
    new, lives = 4, {0, 1, 2, 3}
    for joins in draw(st.lists(st.booleans(), max_size=8)):
        if joins:
            workers = set(range(new, new + draw(st.integers(1, 3))))
            new, lives = new + len(workers), lives | workers
            rosters.append(rosters[-1].with_added(map(WorkerId, workers), WorkerId(0)))
        elif lives:
            workers = draw(st.sets(st.sampled_from(sorted(lives)), min_size=1))
            lives -= workers
            rosters.append(rosters[-1].without(map(WorkerId, workers), WorkerId(0)))
    return rosters


@given(histories())
def test_a_roster_is_read_as_it_was_written(rosters: list[Roster]) -> None:
    for roster in rosters[1:]:
        assert decode_roster(roster.encode()) == roster


@given(histories(), st.sets(st.integers(0, 3), min_size=1), st.booleans())
def test_changes_are_those_of_each_epoch(rosters: list[Roster], members: set[int], grows: bool) -> None:
    """Who hears of the last roster only learns the same, in the same order, as who hears of each.

    A loss is a change of every communicator, an admission only of the one that grows.
    """
    heard: list[Change] = []
    known = set(members)
    for before, roster in pairwise(rosters):
        added = [worker for worker, _ in roster.added[len(before.added) :] if grows]
        known |= set(added)
        removed = [worker for worker, _ in roster.removed[len(before.removed) :] if worker in known]
        if added or len(roster.removed) > len(before.removed):
            heard.append(Change(epoch=roster.epoch, removed=tuple(removed), added=tuple(added)))
    assert list(rosters[-1].changes(map(WorkerId, members), grows=grows)) == heard


def test_who_comes_while_another_is_lost_is_not_forgotten() -> None:
    store = dist.HashStore()
    first = remove(store, FIRST, [WorkerId(2)], by=WorkerId(0))
    second = add(store, FIRST, [WorkerId(3)], by=WorkerId(1))
    assert (second.epoch, second.removed, second.added) == (2, first.removed, ((WorkerId(3), 2),))


@pytest.mark.parametrize(
    "text",
    [
        "[" * 100_000,
        "{}",
        json.dumps({"epoch": 2, "removed": [[1, 1]], "added": [], "writer": 0}),
        json.dumps({"epoch": 1, "removed": [], "added": [[1, 1], [1, 1]], "writer": 0}),
        json.dumps({"epoch": 1 << 40, "removed": [[1, 1 << 40]], "added": [], "writer": 0}),
        json.dumps({"epoch": 1, "removed": [[1, 1], [1, 1]], "added": [], "writer": 0}),
        json.dumps({"epoch": 1, "removed": [[1, -1]], "added": [], "writer": 0}),
        '{"epoch": 1, "removed": [[1, Infinity]], "added": [], "writer": 0}',
        "\udcff",
    ],
)
def test_what_nobody_can_have_written_is_refused(text: str) -> None:
    with pytest.raises(ProtocolError):
        decode_roster(text)
