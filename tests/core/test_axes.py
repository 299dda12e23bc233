"""Named axes against nested loops; stage replicas of a layout."""

from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from elaswave.core.axes import LAYOUT_AXES, Axes, StageReplica, stage_replicas
from elaswave.core.ids import WorkerId
from elaswave.core.layout import Layout
from elaswave.errors import InvariantError

sizes = st.integers(1, 4)


@st.composite
def any_axes(draw: st.DrawFn) -> Axes:
    """Up to four axes."""
    names = draw(st.lists(st.sampled_from(["dp", "pp", "tp", "cp", "ep"]), unique=True, max_size=4))
    return Axes(names=tuple(names), sizes=tuple(draw(sizes) for _ in names))


def naive_places(axes: Axes) -> list[dict[str, int]]:
    """Coordinates of all places in order: the last axis runs fastest."""
    return [dict(zip(axes.names, where, strict=True)) for where in product(*map(range, axes.sizes))]


@given(any_axes())
def test_places_and_coordinates_are_inverse(axes: Axes) -> None:
    wanted = naive_places(axes)
    assert axes.size == len(wanted)
    for place, where in enumerate(wanted):
        assert axes.coordinates(place) == where
        assert axes.places(where) == (place,)
    assert axes.places({}) == tuple(range(axes.size))


@given(any_axes().filter(lambda axes: bool(axes.names)), st.data())
def test_groups_along_an_axis_differ_on_it_only_and_divide_all_places(axes: Axes, data: st.DataObject) -> None:
    axis = data.draw(st.sampled_from(axes.names))
    everything = naive_places(axes)
    groups = {axes.along(axis, place) for place in range(axes.size)}
    assert sorted(place for group in groups for place in group) == list(range(axes.size))
    for group in groups:
        assert [everything[place][axis] for place in group] == list(range(len(group)))
        assert len({tuple((n, w) for n, w in everything[place].items() if n != axis) for place in group}) == 1


@given(sizes, sizes, sizes, st.integers(1, 2))
def test_a_stage_replica_is_what_lies_between_two_stages_of_one_pipeline(dp: int, pp: int, tp: int, cp: int) -> None:
    axes = Axes(names=(*LAYOUT_AXES, "cp"), sizes=(dp, pp, tp, cp))
    workers = [WorkerId(10 + place) for place in range(axes.size)]
    stages = stage_replicas(axes, workers)
    assert [len(replicas) for replicas in stages] == [dp] * pp
    for d, p in product(range(dp), range(pp)):
        first = (d * pp + p) * tp * cp
        replica = stages[p][d]
        assert replica.workers == tuple(workers[first : first + tp * cp])
        for t, c in product(range(tp), range(cp)):
            worker = workers[first + t * cp + c]
            assert replica.along("tp", worker) == tuple(workers[first + other * cp + c] for other in range(tp))
            assert replica.along("cp", worker) == tuple(workers[first + t * cp : first + (t + 1) * cp])


def test_layouts_have_their_degrees_as_axes() -> None:
    axes = Layout(dp=3, pp=2).axes
    assert (axes.names, axes.sizes) == (("dp", "pp", "tp"), (3, 2, 1))
    assert [replica.workers for replica in stage_replicas(axes, [WorkerId(w) for w in range(6)])[1]] == [
        (1,),
        (3,),
        (5,),
    ]


def test_what_does_not_fit_is_refused() -> None:
    axes = Axes(names=("dp", "tp"), sizes=(2, 3))
    with pytest.raises(InvariantError, match="place 6"):
        axes.coordinates(6)
    with pytest.raises(InvariantError, match=r"no place \{'tp': 3\}"):
        axes.places({"tp": 3})
    with pytest.raises(InvariantError, match=r"no place \{'cp': 0\}"):
        axes.places({"cp": 0})
    with pytest.raises(InvariantError, match="no axis 'cp'"):
        axes.along("cp", 0)
    with pytest.raises(InvariantError, match="names are distinct"):
        Axes(names=("tp", "tp"), sizes=(1, 1))
    with pytest.raises(InvariantError, match="sizes from 1"):
        Axes(names=("tp",), sizes=(0,))
    with pytest.raises(InvariantError, match="2 workers"):
        StageReplica(workers=(WorkerId(0), WorkerId(1)), axes=Axes(names=("tp",), sizes=(1,)))
