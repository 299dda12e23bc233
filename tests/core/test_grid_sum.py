"""Sums over a grid, played on numbers: every survivor ends with the sum of all survivors, over old groups only."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from elaswave.core.grid_sum import GroupSum, HandOver, Tell, grid_sum
from elaswave.core.ids import WorkerId
from elaswave.errors import InvariantError


def grid_of(rows: int, width: int) -> list[list[WorkerId]]:
    return [[WorkerId(row * width + column) for column in range(width)] for row in range(rows)]


@given(rows=st.integers(1, 5), width=st.integers(1, 5), data=st.data())
def test_survivors_hold_the_sum_of_survivors(rows: int, width: int, data: st.DataObject) -> None:
    grid = grid_of(rows, width)
    workers = [worker for row in grid for worker in row]
    lost = data.draw(st.sets(st.sampled_from(workers), max_size=4))
    columns = [list(column) for column in zip(*grid, strict=True)]
    operations = grid_sum(grid, lost)
    whole = [any(lost.isdisjoint(line) for line in lines) for lines in (grid, columns)]
    assert (operations is None) == (not all(whole))
    if operations is None:
        return
    held = {worker: 1 << worker for worker in workers if worker not in lost}
    total = sum(held.values())
    for operation in operations:
        match operation:
            case HandOver(source=source, target=target):
                held[target], held[source] = held[target] + held[source], 0
            case Tell(source=source, target=target):
                held[target] = held[source]
            case GroupSum(members=members):
                assert list(members) in [*grid, *columns], "no other groups"
                together = sum(held[member] for member in members)
                held.update(dict.fromkeys(members, together))
    assert set(held) == set(workers) - lost
    assert set(held.values()) == {total}


def test_one_loss_costs_two_messages_a_worker_at_most() -> None:
    operations = grid_sum(grid_of(4, 4), {WorkerId(5)})
    assert operations is not None
    sources = [found.source for found in operations if not isinstance(found, GroupSum)]
    assert len(sources) == 3 + 3, "three handed over, three told"
    assert len([found for found in operations if isinstance(found, GroupSum)]) == 3 + 3


def test_grids_have_rows_of_equal_length() -> None:
    with pytest.raises(InvariantError, match="equal length"):
        grid_sum([[WorkerId(0)], [WorkerId(1), WorkerId(2)]], set())
    with pytest.raises(InvariantError, match="each worker once"):
        grid_sum([[WorkerId(0)], [WorkerId(0)]], set())
