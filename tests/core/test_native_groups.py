"""Which native communicators a layout has: everybody is reached by small groups, and a loss touches few of them."""

from itertools import combinations

from hypothesis import given
from hypothesis import strategies as st

from elaswave.core.axes import LAYOUT_AXES, Axes
from elaswave.core.ids import WorkerId
from elaswave.core.native_groups import grid_rows, native_groups, touched

SIZES = st.tuples(st.integers(1, 12), st.integers(1, 4), st.integers(1, 3))


@given(sizes=SIZES, data=st.data())
def test_groups_connect_whoever_exchanges_something(sizes: tuple[int, int, int], data: st.DataObject) -> None:
    axes = Axes(names=LAYOUT_AXES, sizes=sizes)
    workers = [WorkerId(index) for index in data.draw(st.permutations(range(axes.size)))]
    groups = native_groups(axes, workers)
    where = {worker: axes.coordinates(place) for place, worker in enumerate(workers)}
    for group in groups:
        assert list(group.members) == sorted(set(group.members))
        assert len({where[worker]["tp"] for worker in group.members}) == 1
        stages = {where[worker]["pp"] for worker in group.members}
        assert stages == ({group.stage, group.stage + 1} if group.kind == "stages" else {group.stage})
    for one, other in combinations(workers, 2):
        if where[one]["tp"] != where[other]["tp"]:
            continue
        apart = abs(where[one]["pp"] - where[other]["pp"])
        together = [group for group in groups if {one, other} <= set(group.members)]
        if apart == 1:
            assert [group.kind for group in together if group.kind == "stages"] == ["stages"]
        if apart == 0:
            rows, columns = lines(groups, one), lines(groups, other)
            assert any(set(row) & set(column) for row in rows for column in columns), "a row and a column meet"


def lines(groups: object, worker: WorkerId) -> list[tuple[WorkerId, ...]]:
    found = [group.members for group in groups if group.kind != "stages" and worker in group.members]  # type: ignore[attr-defined]
    return [*found, (worker,)]


@given(sizes=SIZES, data=st.data())
def test_a_loss_touches_its_row_its_column_and_its_edges(sizes: tuple[int, int, int], data: st.DataObject) -> None:
    axes = Axes(names=LAYOUT_AXES, sizes=sizes)
    workers = [WorkerId(index) for index in range(axes.size)]
    groups = native_groups(axes, workers)
    lost = data.draw(st.sampled_from(workers))
    found = touched(groups, {lost})
    assert [group for group in groups if lost in group.members] == list(found)
    kinds = [group.kind for group in found]
    assert kinds.count("row") <= 1
    assert kinds.count("column") <= 1
    assert kinds.count("stages") <= 2


def test_grids_are_as_square_as_they_can_be() -> None:
    assert [grid_rows(replicas) for replicas in (1, 2, 4, 6, 7, 12, 16)] == [1, 1, 2, 2, 1, 3, 4]
