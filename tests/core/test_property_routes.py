"""Stages and routes: every layer once; a loss moves the hops of the lost, evenly, and nothing else."""

from collections import Counter
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from planning_strategies import NEW, Losses, check_cover, losses

from elaswave.core.ids import Epoch, Layer, WorkerId
from elaswave.core.layout import Layout, check_batch, partition_layers
from elaswave.core.plan import Hop, Route
from elaswave.core.routes import balanced_routes, moved_hops, reassign_hops, uncovered_layers
from elaswave.errors import ConfigError


@given(st.integers(1, 12), st.integers(1, 12))
@settings(max_examples=100)
def test_stages_cover_the_layers_and_differ_by_one_at_most(layers: int, stages: int) -> None:
    if stages > layers:
        with pytest.raises(ConfigError, match=f"--pp is {stages} but the model has {layers} layers"):
            partition_layers(layers, stages)
        return
    found = partition_layers(layers, stages)
    sizes = [len(stage.layers) for stage in found]
    assert [layer for stage in found for layer in stage.layers] == list(range(layers))
    assert len(found) == stages
    assert max(sizes) - min(sizes) <= 1
    assert sizes == sorted(sizes, reverse=True)


@given(st.integers(1, 6), st.integers(1, 12))
@settings(max_examples=60)
def test_every_pipeline_needs_a_micro_batch(dp: int, micro_batches: int) -> None:
    if micro_batches >= dp:
        check_batch(micro_batches=micro_batches, layout=Layout(dp=dp, pp=1))
        return
    with pytest.raises(ConfigError, match=f"{micro_batches} micro-batches for --dp {dp}"):
        check_batch(micro_batches=micro_batches, layout=Layout(dp=dp, pp=1))


@given(st.data())
@settings(max_examples=100)
def test_balanced_routes_cover_all_layers_and_share_evenly(data: st.DataObject) -> None:
    pp = data.draw(st.integers(1, 4))
    layers = data.draw(st.integers(pp, 9))
    stages = partition_layers(layers, pp)
    hosts = [data.draw(st.lists(st.integers(0, 9).map(WorkerId), unique=True, min_size=1)) for _ in range(pp)]
    routes = balanced_routes(stages, hosts, data.draw(st.integers(1, 12)), NEW)
    for route in routes:
        check_cover(route, layers)
        assert uncovered_layers(route, layers) == ()
        assert all(hop.epoch == NEW for hop in route)
    for position, found in enumerate(hosts):
        served = Counter(route[position].worker for route in routes)
        shares = [served[worker] for worker in found]
        assert served.keys() <= set(found)
        assert max(shares) - min(shares) <= 1


@given(losses(), st.data())
@settings(max_examples=60)
def test_a_route_with_a_hole_or_an_overlap_is_noticed(case: Losses, data: st.DataObject) -> None:
    route = list(data.draw(st.sampled_from(case.before)))
    index = data.draw(st.integers(0, len(route) - 1))
    doubled = [*route[:index], route[index], *route[index:]]
    assert uncovered_layers(tuple(doubled), case.layers) != ()
    del route[index]
    assert uncovered_layers(tuple(route), case.layers) != ()


@given(losses())
@settings(max_examples=100)
def test_only_hops_of_the_lost_move_and_all_of_them_get_the_new_epoch(case: Losses) -> None:
    assert len(case.after) == len(case.before)
    moved: list[tuple[int, Hop]] = []
    for index, (was, now) in enumerate(zip(case.before, case.after, strict=True)):
        check_cover(now, case.layers)
        for old, new in zip(was, now, strict=True):
            if old.worker not in case.lost:
                assert new == old
                continue
            moved.append((index, new))
            assert (new.first, new.last, new.epoch) == (old.first, old.last, NEW)
            assert new.worker in case.candidates[(new.first, new.last)]
    assert moved_hops(case.before, case.after) == moved


def loads(routes: Sequence[Route]) -> Counter[WorkerId]:
    """Layers that each worker runs, over all micro-batches."""
    return Counter(hop.worker for route in routes for hop in route for _ in range(hop.first, hop.last))


@given(losses())
@settings(max_examples=100)
def test_survivors_of_a_stage_share_its_lost_hops_evenly(case: Losses) -> None:
    if any(set(found) <= case.lost for found in case.hosts):
        return  # Who also takes hops of another stage is compared across stages: the next test.
    before, after = loads(case.before), loads(case.after)
    for stage, hosts in zip(case.stages, case.hosts, strict=True):
        left = [worker for worker in hosts if worker not in case.lost]
        uneven = max(before[w] for w in left) - min(before[w] for w in left)
        assert max(after[w] for w in left) - min(after[w] for w in left) <= max(uneven, stage.last - stage.first)


@given(losses())
@settings(max_examples=100)
def test_no_lost_hop_goes_to_a_candidate_that_ends_up_a_hop_above_another(case: Losses) -> None:
    after = loads(case.after)
    taken: Counter[WorkerId] = Counter()
    for route in reversed(case.after):
        for hop in reversed(route):
            if hop.epoch != NEW:
                continue
            size = hop.last - hop.first
            # Loads only grow: at its last hop a worker was not above what any other candidate has in the end.
            if not taken[hop.worker]:
                others = [after[worker] for worker in case.candidates[(hop.first, hop.last)]]
                assert after[hop.worker] - size <= min(others)
            taken[hop.worker] += size


def test_ties_go_to_the_lower_id() -> None:
    stages = partition_layers(2, 1)
    hosts = [[WorkerId(0), WorkerId(1), WorkerId(2)]]
    routes = balanced_routes(stages, hosts, 3, Epoch(1))
    for order in ([1, 2], [2, 1]):
        candidates = {(Layer(0), Layer(2)): [WorkerId(worker) for worker in order]}
        found = reassign_hops(routes, frozenset((WorkerId(0),)), candidates, NEW)
        assert found[0][0].worker == WorkerId(1)
