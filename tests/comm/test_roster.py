"""The roster on a store that several write to."""

import json

import pytest
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

from elaswave.comm.roster import FIRST, Roster, decode_roster, remove
from elaswave.core.ids import WorkerId
from elaswave.errors import ProtocolError


def test_who_was_removed_removes_nobody() -> None:
    """Its links were closed by all others, whom it would otherwise take for lost, one after the other."""
    store = dist.HashStore()
    first = remove(store, FIRST, [WorkerId(2)], by=WorkerId(0))
    assert remove(store, FIRST, [WorkerId(0)], by=WorkerId(2)) == first
    second = remove(store, FIRST, [WorkerId(1)], by=WorkerId(0))
    assert (second.epoch, second.removed) == (2, ((WorkerId(2), 1), (WorkerId(1), 2)))


@given(st.lists(st.sets(st.integers(0, 99), min_size=1), min_size=1, max_size=5))
def test_a_roster_is_read_as_it_was_written(losses: list[set[int]]) -> None:
    roster: Roster = FIRST
    for lost in losses:
        roster = roster.without([WorkerId(worker) for worker in lost], WorkerId(100))
    assert decode_roster(roster.encode()) == roster


@pytest.mark.parametrize(
    "text",
    [
        "[" * 100_000,
        "{}",
        json.dumps({"epoch": 2, "removed": [[1, 1]], "writer": 0}),
        json.dumps({"epoch": 1 << 40, "removed": [[1, 1 << 40]], "writer": 0}),
        json.dumps({"epoch": 1, "removed": [[1, 1], [1, 1]], "writer": 0}),
        json.dumps({"epoch": 1, "removed": [[1, -1]], "writer": 0}),
        '{"epoch": 1, "removed": [[1, Infinity]], "writer": 0}',
        "\udcff",
    ],
)
def test_what_nobody_can_have_written_is_refused(text: str) -> None:
    with pytest.raises(ProtocolError):
        decode_roster(text)
