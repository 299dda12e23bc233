"""Layouts and routes against naive counting."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from elaswave.core.ids import BlockId, Epoch, Layer, MicroBatch, WorkerId
from elaswave.core.layout import Layout, Stage, check_batch, partition_layers
from elaswave.core.plan import Hop, Route, hop_of_layer
from elaswave.core.routes import balanced_routes, moved_hops, reassign_hops, uncovered_layers
from elaswave.core.shape import CHUNK_ELEMENTS, Block, ModelShape, divide_into_shards
from elaswave.errors import ConfigError

small = st.integers(1, 6)


def layers_run(route: Route) -> Counter[int]:
    """How often each layer is run, counted one by one."""
    return Counter(layer for hop in route for layer in range(hop.first, hop.last))


def once(layers: int) -> Counter[int]:
    return Counter(range(layers))


@st.composite
def grids(draw: st.DrawFn) -> tuple[tuple[Stage, ...], tuple[tuple[WorkerId, ...], ...]]:
    """Stages and their hosts; a worker may host several stages."""
    stages = draw(small)
    found = partition_layers(draw(st.integers(stages, 12)), stages)
    hosts = st.lists(st.integers(0, 9), min_size=1, max_size=4, unique=True)
    return found, tuple(tuple(WorkerId(w) for w in draw(hosts)) for _ in found)


# ---------------------------------------------------------------------- stages


@given(layers=st.integers(1, 200), stages=st.integers(1, 200))
def test_stages_are_contiguous_and_even(layers: int, stages: int) -> None:
    if stages > layers:
        with pytest.raises(ConfigError, match=f"--pp is {stages} but the model has {layers} layers"):
            partition_layers(layers, stages)
        return
    found = [list(stage.layers) for stage in partition_layers(layers, stages)]
    assert found == [part.tolist() for part in np.array_split(np.arange(layers), stages)]


@pytest.mark.parametrize(("flag", "degrees"), [("--dp", (0, 1)), ("--pp", (1, 0)), ("--pp", (2, -3))])
def test_degrees_below_one_are_refused(flag: str, degrees: tuple[int, int]) -> None:
    with pytest.raises(ConfigError, match=flag):
        Layout(dp=degrees[0], pp=degrees[1])


def test_tensor_parallelism_is_refused() -> None:
    with pytest.raises(ConfigError, match="--tp is 2"):
        Layout(dp=1, pp=1, tp=2)


@given(dp=small, pp=small, micro_batches=st.integers(1, 12))
def test_every_pipeline_needs_a_micro_batch(dp: int, pp: int, micro_batches: int) -> None:
    layout = Layout(dp=dp, pp=pp)
    assert layout.workers == dp * pp
    if micro_batches >= dp:
        check_batch(micro_batches=micro_batches, layout=layout)
    else:
        with pytest.raises(ConfigError, match=f"{micro_batches} micro-batches for --dp {dp}"):
            check_batch(micro_batches=micro_batches, layout=layout)


# ---------------------------------------------------------------------- routes


@given(grid=grids(), micro_batches=st.integers(1, 30))
def test_balanced_routes_cover_each_layer_once_and_are_even(
    grid: tuple[tuple[Stage, ...], tuple[tuple[WorkerId, ...], ...]], micro_batches: int
) -> None:
    stages, hosts = grid
    routes = balanced_routes(stages, hosts, micro_batches, Epoch(3))
    assert len(routes) == micro_batches
    for route in routes:
        assert layers_run(route) == once(stages[-1].last)
        assert uncovered_layers(route, stages[-1].last) == ()
        assert {hop.epoch for hop in route} == {3}
    for place, allowed in enumerate(hosts):
        counts = Counter({worker: 0 for worker in allowed})
        counts.update(route[place].worker for route in routes)
        assert set(counts) == set(allowed)
        assert max(counts.values()) - min(counts.values()) <= 1


@given(dp=small, pp=small, micro_batches=st.integers(1, 20))
def test_equally_many_hosts_make_straight_pipelines(dp: int, pp: int, micro_batches: int) -> None:
    grid = tuple(tuple(WorkerId(d * pp + p) for d in range(dp)) for p in range(pp))
    for route in balanced_routes(partition_layers(pp, pp), grid, micro_batches, Epoch(1)):
        assert len({hop.worker // pp for hop in route}) == 1


@given(grid=grids(), micro_batches=st.integers(1, 30), data=st.data())
def test_reassigning_moves_lost_hops_only_and_evenly(
    grid: tuple[tuple[Stage, ...], tuple[tuple[WorkerId, ...], ...]], micro_batches: int, data: st.DataObject
) -> None:
    stages, hosts = grid
    everyone = sorted({worker for found in hosts for worker in found})
    lost = frozenset(data.draw(st.lists(st.sampled_from(everyone), unique=True)))
    spare = WorkerId(99)
    candidates = {
        (stage.first, stage.last): sorted(set(found) - lost) or [spare]
        for stage, found in zip(stages, hosts, strict=True)
    }
    old = balanced_routes(stages, hosts, micro_batches, Epoch(1))
    new = reassign_hops(old, lost, candidates, Epoch(2))
    assert new == reassign_hops(old, lost, {key: list(reversed(found)) for key, found in candidates.items()}, Epoch(2))
    load: Counter[int] = Counter({worker: 0 for found in candidates.values() for worker in found})
    for was, now in zip(old, new, strict=True):
        assert layers_run(now) == once(stages[-1].last)
        for before, after in zip(was, now, strict=True):
            load[after.worker] += after.last - after.first
            if before.worker not in lost:
                assert after is before
            else:
                assert (after.first, after.last, after.epoch) == (before.first, before.last, 2)
                assert after.worker in candidates[(after.first, after.last)]
    # Whoever was given a hop of some size had the least load then: at the end nobody has more than that size less.
    for (first, last), found in candidates.items():
        given_to = {hop.worker for _, hop in moved_hops(old, new) if (hop.first, hop.last) == (first, last)}
        for worker in given_to & set(found):
            largest = max(stage.last - stage.first for stage in stages)
            assert load[worker] <= min(load[other] for other in found) + largest * len(stages)
    if len(stages) == 1 and lost and set(everyone) - lost:
        survivors = sorted(set(everyone) - lost)
        assert max(load[w] for w in survivors) - min(load[w] for w in survivors) <= stages[0].last


@given(hops=st.lists(st.tuples(st.integers(0, 5), st.integers(0, 6)), max_size=4), layers=st.integers(1, 6))
def test_uncovered_layers_finds_gaps_and_overlaps(hops: list[tuple[int, int]], layers: int) -> None:
    route = tuple(Hop(worker=WorkerId(0), epoch=Epoch(1), first=Layer(a), last=Layer(b)) for a, b in hops)
    in_order = [layer for a, b in hops for layer in range(a, b)] == list(range(layers))
    valid = in_order and all(a < b for a, b in hops)
    assert (uncovered_layers(route, layers) == ()) == valid


@given(grid=grids(), micro_batches=st.integers(1, 8), data=st.data())
def test_moved_hops_and_hop_of_layer(
    grid: tuple[tuple[Stage, ...], tuple[tuple[WorkerId, ...], ...]], micro_batches: int, data: st.DataObject
) -> None:
    stages, hosts = grid
    old = balanced_routes(stages, hosts, micro_batches, Epoch(1))
    lost = frozenset({data.draw(st.sampled_from(hosts[0]))})
    candidates = {(stage.first, stage.last): [WorkerId(50)] for stage in stages}
    new = reassign_hops(old, lost, candidates, Epoch(2))
    naive = [
        (MicroBatch(m), hop) for m in range(micro_batches) for hop in new[m] if all(hop != other for other in old[m])
    ]
    assert moved_hops(old, new) == naive
    for layer in range(stages[-1].last):
        hop = hop_of_layer(new[0], Layer(layer))
        assert hop.first <= layer < hop.last


# ---------------------------------------------------------------------- shards


@given(chunks=st.lists(st.integers(0, 40), min_size=1, max_size=5), parts=st.integers(1, 9))
def test_shards_tile_their_blocks(chunks: list[int], parts: int) -> None:
    blocks = tuple(Block(layers=(Layer(index),), elements=count * CHUNK_ELEMENTS) for index, count in enumerate(chunks))
    shape = ModelShape(len(blocks), blocks, divide_into_shards(blocks, parts))
    for index, block in enumerate(blocks):
        found = [shape.shards[shard] for shard in shape.shards_of_block[index]]
        covered = np.zeros(block.elements, dtype=int)
        for shard in found:
            covered[shard.start : shard.stop] += 1
            assert shard.block == BlockId(index)
            assert shard.start % CHUNK_ELEMENTS == shard.stop % CHUNK_ELEMENTS == 0
        assert (covered == 1).all()
        assert 1 <= len(found) <= parts
        sizes = [shard.elements for shard in found]
        assert max(sizes) - min(sizes) <= CHUNK_ELEMENTS
        assert len(found) == max(1, min(parts, chunks[index]))
    assert shape.loss_shard == shape.shards_of_layer[len(blocks) - 1][0]


def test_blocks_must_be_padded() -> None:
    with pytest.raises(ConfigError, match="pad it to a multiple"):
        divide_into_shards((Block(layers=(Layer(0),), elements=CHUNK_ELEMENTS + 1),), 2)


def test_a_tied_block_belongs_to_all_its_layers() -> None:
    blocks = (
        Block(layers=(Layer(0),), elements=0),
        Block(layers=(Layer(1),), elements=CHUNK_ELEMENTS),
        Block(layers=(Layer(0), Layer(1)), elements=2 * CHUNK_ELEMENTS),
    )
    shape = ModelShape(2, blocks, divide_into_shards(blocks, 2))
    assert shape.shards_of_layer == ((0, 2, 3), (1, 2, 3))
    assert shape.layers_of_shard(shape.shards_of_block[2][1]) == (0, 1)
    assert shape.blocks_of_layer == ((0, 2), (1, 2))
