"""Placement of copies: distinct workers, as many failure domains as there are, spread over who may hold them."""

from collections import Counter
from collections.abc import Sequence
from math import ceil

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from planning_strategies import make_members

from elaswave.core.ids import BlockId, Layer, WorkerId
from elaswave.core.layout import Layout
from elaswave.core.placement import Placement, place_shards
from elaswave.core.plan import Group, Member
from elaswave.core.planner.initial import grid_of, make_shape
from elaswave.core.shape import CHUNK_ELEMENTS, Block, ModelShape, Shard, divide_into_shards
from elaswave.errors import ConfigError

Hosts = dict[Layer, tuple[WorkerId, ...]]


def one_layer(shards: int, elements: int = CHUNK_ELEMENTS) -> ModelShape:
    """One layer whose parameters are cut into equal shards."""
    block = Block(layers=(Layer(0),), elements=shards * elements)
    cuts = tuple(Shard(block=BlockId(0), start=i * elements, stop=(i + 1) * elements) for i in range(shards))
    return ModelShape(1, (block,), cuts)


@st.composite
def clusters(draw: st.DrawFn) -> tuple[ModelShape, list[Member], Hosts, int]:
    """Any model on workers of 1 to 4 nodes, each layer hosted by some of them, with a number of replicas that fits."""
    members = make_members(draw(st.lists(st.integers(0, 3), min_size=2, max_size=9)))
    ids = st.sampled_from([member.worker for member in members])
    layers = draw(st.integers(1, 4))
    sizes = draw(st.lists(st.integers(0, 6), min_size=layers, max_size=layers))
    blocks = [Block(layers=(Layer(layer),), elements=size * CHUNK_ELEMENTS) for layer, size in enumerate(sizes)]
    if layers > 1 and draw(st.booleans()):
        blocks.append(Block(layers=(Layer(0), Layer(layers - 1)), elements=3 * CHUNK_ELEMENTS))
    shape = ModelShape(layers, tuple(blocks), divide_into_shards(tuple(blocks), draw(st.integers(1, 4))))
    hosts = {Layer(layer): tuple(draw(st.lists(ids, unique=True, min_size=1))) for layer in range(layers)}
    return shape, members, hosts, draw(st.integers(0, min(3, len(members) - 1)))


def nodes_of(members: Sequence[Member], copies: Sequence[WorkerId]) -> list[str]:
    """Failure domains of copies."""
    where = {member.worker: member.node for member in members}
    return [where[worker] for worker in copies]


@given(clusters())
@settings(max_examples=100)
def test_copies_are_on_distinct_workers_the_owner_on_a_host(case: tuple[ModelShape, list[Member], Hosts, int]) -> None:
    shape, members, hosts, replicas = case
    groups = place_shards(shape, members, hosts, replicas)
    assert len(groups) == len(shape.shards)
    for shard, group in zip(shape.shards, groups, strict=True):
        assert group == Group(owner=group.owner, replicas=group.replicas)
        assert group.owner is not None
        assert any(group.owner in hosts[layer] for layer in shape.blocks[shard.block].layers)
        assert len(set(group.everyone)) == replicas + 1
        assert set(group.everyone) <= {member.worker for member in members}


@given(clusters())
@settings(max_examples=100)
def test_copies_are_in_as_many_failure_domains_as_possible(case: tuple[ModelShape, list[Member], Hosts, int]) -> None:
    shape, members, hosts, replicas = case
    nodes = {member.node for member in members}
    for group in place_shards(shape, members, hosts, replicas):
        assert len(set(nodes_of(members, group.everyone))) == min(replicas + 1, len(nodes))
        # The first replica alone must survive the node of the owner, where there is another node.
        first = nodes_of(members, group.everyone[:2])
        assert replicas == 0 or len(nodes) == 1 or len(set(first)) == 2


@given(clusters(), st.data())
@settings(max_examples=60)
def test_the_order_in_which_members_and_hosts_are_told_does_not_matter(
    case: tuple[ModelShape, list[Member], Hosts, int], data: st.DataObject
) -> None:
    shape, members, hosts, replicas = case
    turned = {layer: tuple(reversed(hosts[layer])) for layer in reversed(hosts)}
    other = data.draw(st.permutations(members))
    assert place_shards(shape, other, turned, replicas) == place_shards(shape, members, hosts, replicas)


@given(st.lists(st.integers(0, 3), min_size=2, max_size=9), st.integers(1, 4), st.integers(1, 24))
@settings(max_examples=100)
def test_one_replica_of_each_shard_is_dealt_out_evenly(nodes: list[int], hosting: int, shards: int) -> None:
    """An owner of k equal shards with c workers outside its node: each of them holds ceil(k / c) replicas at most,
    and floor(k / c) at least. Where there is one node only, all other workers count."""
    members = make_members(nodes)
    hosts = {Layer(0): tuple(member.worker for member in members[:hosting])}
    groups = place_shards(one_layer(shards), members, hosts, 1)
    for member in members[:hosting]:
        outside = [other for other in members if other.node != member.node]
        eligible = outside or [other for other in members if other != member]
        held = Counter(group.replicas[0] for group in groups if group.owner == member.worker)
        owned = held.total()
        assert held.keys() <= {other.worker for other in eligible}
        for other in eligible:
            assert owned // len(eligible) <= held[other.worker] <= ceil(owned / len(eligible))


@given(st.integers(2, 8), st.integers(1, 3), st.integers(1, 4), st.integers(1, 24))
@settings(max_examples=100)
def test_more_replicas_are_dealt_out_evenly_over_workers_on_nodes_of_their_own(
    workers: int, replicas: int, hosting: int, shards: int
) -> None:
    """With r replicas and no two workers on a node, each of the c others holds ceil(k r / c) at most."""
    if replicas >= workers:
        return
    members = make_members(range(workers))
    hosts = {Layer(0): tuple(member.worker for member in members[:hosting])}
    groups = place_shards(one_layer(shards), members, hosts, replicas)
    for member in members[:hosting]:
        mine = [group for group in groups if group.owner == member.worker]
        held = Counter(worker for group in mine for worker in group.replicas)
        most = ceil(len(mine) * replicas / (workers - 1))
        assert all(count <= most for count in held.values())


@given(st.lists(st.integers(0, 3), min_size=2, max_size=9), st.integers(1, 9), st.integers(1, 24))
@settings(max_examples=60)
def test_equal_shards_are_owned_evenly(nodes: list[int], hosting: int, shards: int) -> None:
    members = make_members(nodes)
    hosts = [member.worker for member in members[:hosting]]
    owned = Counter(group.owner for group in place_shards(one_layer(shards), members, {Layer(0): tuple(hosts)}, 1))
    assert max(owned[worker] for worker in hosts) - min(owned[worker] for worker in hosts) <= 1


@given(clusters())
@settings(max_examples=60)
def test_a_replica_is_sought_in_vain_only_where_all_workers_hold_one(
    case: tuple[ModelShape, list[Member], Hosts, int],
) -> None:
    _, members, _, _ = case
    placement = Placement(members)
    copies = [members[0].worker]
    for _ in members[1:]:
        found = placement.replica(copies[0], copies, CHUNK_ELEMENTS)
        assert found is not None
        assert found not in copies
        copies.append(found)
    assert placement.replica(copies[0], copies, CHUNK_ELEMENTS) is None


@given(st.integers(1, 6), st.integers(0, 8))
@settings(max_examples=60)
def test_a_shard_needs_a_worker_per_copy(workers: int, replicas: int) -> None:
    members = make_members(range(workers))
    hosts = {Layer(0): tuple(member.worker for member in members)}
    if replicas < workers:
        assert all(len(g.everyone) == replicas + 1 for g in place_shards(one_layer(2), members, hosts, replicas))
        return
    with pytest.raises(ConfigError, match=f"--replicas is {replicas} with {workers} workers"):
        place_shards(one_layer(2), members, hosts, replicas)


@given(st.integers(1, 4), st.integers(1, 4), st.integers(0, 6))
@settings(max_examples=60)
def test_every_host_of_a_layer_owns_an_equal_part_of_it(dp: int, pp: int, chunks: int) -> None:
    """One shard per block and pipeline; the parts differ by one chunk at most."""
    layout = Layout(dp=dp, pp=pp)
    shape = make_shape(
        pp, tuple(Block(layers=(Layer(p),), elements=chunks * CHUNK_ELEMENTS) for p in range(pp)), layout
    )
    members = make_members(range(layout.workers))
    grid = grid_of(layout, members)
    hosts = {Layer(p): grid[p] for p in range(pp)}
    groups = place_shards(shape, members, hosts, 1 if layout.workers > 1 else 0)
    for p in range(pp):
        owned: Counter[WorkerId | None] = Counter()
        for shard in shape.shards_of_layer[p]:
            owned[groups[shard].owner] += shape.shards[shard].elements
        sizes = [owned[worker] for worker in grid[p]]
        assert sum(sizes) == chunks * CHUNK_ELEMENTS
        assert max(sizes) - min(sizes) <= CHUNK_ELEMENTS
