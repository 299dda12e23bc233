"""Reduce plans against naive oracles: all contributions reach the owner once, and links carry the same."""

import random
from collections import Counter
from dataclasses import replace
from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st
from planning_strategies import Job, jobs

from elaswave.core.ids import Epoch, Layer, NodeId, ShardId, Step, WorkerId
from elaswave.core.plan import Plan, RouteTable
from elaswave.core.planner.context import supersede
from elaswave.core.planner.loss import plan_loss
from elaswave.core.planner.reductions import changed_layers, with_reduce_plans
from elaswave.core.reduce_plan import ReducePlan, make_reduce_plan, path_to_owner

workers = st.integers(0, 12).map(WorkerId)
nodes = st.sampled_from(["n0", "n1", "n2"]).map(NodeId)
hosts_on_nodes = st.dictionaries(workers, nodes, min_size=1, max_size=8)


def ring_of(hosts: dict[WorkerId, NodeId]) -> ReducePlan:
    return make_reduce_plan("ring", hosts, epoch=Epoch(1), first_step=Step(0))


@given(hosts_on_nodes, st.data())
def test_all_sums_of_contributors_reach_the_owner_once(hosts: dict[WorkerId, NodeId], data: st.DataObject) -> None:
    plan = ring_of(hosts)
    order = plan.order or tuple(hosts)
    owner = data.draw(workers)
    contributors = data.draw(st.sets(st.sampled_from(order)))
    path = path_to_owner(order, contributors, owner, ShardId(data.draw(st.integers(0, 20))))
    # Follow the messages: who gets one adds what is its own and sends all of it on.
    carried: Counter[WorkerId] = Counter()
    for worker in path:
        carried[worker] += worker in contributors
    assert path[-1] == owner
    assert len(set(path)) == len(path)
    assert +carried == Counter(contributors)
    assert set(path) - {owner} == contributors - {owner}


@given(hosts_on_nodes)
def test_each_link_of_the_ring_carries_one_sum_of_all_shards_but_one(hosts: dict[WorkerId, NodeId]) -> None:
    order = ring_of(hosts).order
    links: Counter[tuple[WorkerId, WorkerId]] = Counter()
    for shard, owner in enumerate(order):  # as many shards as hosts, each owns one
        path = path_to_owner(order, set(order), owner, ShardId(shard))
        links.update(pairwise(path))
    expected = {(worker, order[(place + 1) % len(order)]): len(order) - 1 for place, worker in enumerate(order)}
    assert links == (expected if len(order) > 1 else {})


@given(st.lists(workers, unique=True, min_size=2, max_size=8), st.integers(0, 5))
def test_shards_of_an_owner_elsewhere_begin_at_all_hosts(order: list[WorkerId], first: int) -> None:
    owner = WorkerId(99)
    shards = [ShardId(first + index) for index in range(len(order))]
    starts = [path_to_owner(tuple(order), set(order), owner, shard)[0] for shard in shards]
    assert sorted(starts) == sorted(order)


@given(hosts_on_nodes, st.integers(0, 2**32))
def test_the_order_in_which_hosts_are_told_does_not_matter(hosts: dict[WorkerId, NodeId], seed: int) -> None:
    told = list(hosts.items())
    random.Random(seed).shuffle(told)
    assert ring_of(dict(told)) == ring_of(hosts)


@given(hosts_on_nodes)
def test_a_ring_enters_every_node_once(hosts: dict[WorkerId, NodeId]) -> None:
    order = ring_of(hosts).order
    crossings = sum(hosts[one] != hosts[order[place - 1]] for place, one in enumerate(order))
    found = len({hosts[worker] for worker in order})
    assert crossings == (found if found > 1 else 0)


def test_one_host_has_nobody_to_combine_with() -> None:
    plan = ring_of({WorkerId(3): NodeId("n0")})
    assert (plan.kind, plan.order) == ("direct", ())


# ---------------------------------------------------------------------- in plans


def ring_plan(job: Job) -> tuple[Job, Plan]:
    job = replace(job, context=replace(job.context, reduce="ring"))
    return job, with_reduce_plans(job.context, None, job.plan, Step(0))


def layer_view(job: Job, plan: Plan, layer: int, step: int) -> object:
    """All that a worker's part in the reduction of a layer follows from, naively."""
    owners = [plan.groups[shard].owner for shard in job.context.shape.shards_of_layer[layer]]
    hops = [
        (hop.worker, hop.epoch)
        for route in plan.table(Step(step)).routes
        for hop in route
        if layer in range(hop.first, hop.last)
    ]
    return sorted(w for w, layers in plan.hosting.items() if layer in layers), owners, hops


@given(jobs())
def test_the_first_plan_has_rings_over_all_hosts_at_once(job: Job) -> None:
    job, plan = ring_plan(job)
    assert set(plan.reduce_plans) == set(range(job.context.shape.layers))
    for layer, found in plan.reduce_plans.items():
        hosts = plan.hosts_of_layer[layer]
        assert sorted(found.order) == (list(hosts) if len(hosts) > 1 else [])
        assert (found.epoch, found.first_step) == (plan.epoch, 0)


@given(jobs(smallest=2), st.data())
def test_a_loss_gives_new_rings_to_the_layers_that_it_changes_and_to_no_other(job: Job, data: st.DataObject) -> None:
    job, plan = ring_plan(job)
    lost = data.draw(st.sets(st.sampled_from(sorted(plan.ids)), min_size=1, max_size=len(plan.ids) - 1))
    fastest = Step(data.draw(st.integers(0, 9)))
    shrunk = plan_loss(job.context, plan, frozenset(lost), Step(0), "loss")
    after = with_reduce_plans(job.context, plan, shrunk, fastest)
    for layer in range(job.context.shape.layers):
        found = after.reduce_plans[Layer(layer)]
        if layer_view(job, plan, layer, 0) == layer_view(job, after, layer, 0):
            assert found == plan.reduce_plans[Layer(layer)]
        else:
            assert (found.epoch, found.first_step) == (after.epoch, fastest + 1)
            assert not set(found.order) & lost
    assert replace(after, reduce_plans={}) == replace(shrunk, reduce_plans={})


@given(jobs(), st.integers(1, 5))
def test_routes_of_a_later_step_change_their_layers_too(job: Job, step: int) -> None:
    job, plan = ring_plan(job)
    turned = tuple(tuple(replace(hop, epoch=Epoch(2)) for hop in route) for route in plan.tables[0].routes)
    later = supersede(plan, "routes", tables=(*plan.tables, RouteTable(first_step=Step(step), routes=turned)))
    assert changed_layers(job.context, plan, later) == list(range(job.context.shape.layers))
    pruned = supersede(later, "old routes are gone", tables=later.tables[1:])
    assert changed_layers(job.context, later, pruned) == []


@given(jobs())
def test_direct_plans_name_no_layer(job: Job) -> None:
    assert with_reduce_plans(job.context, None, job.plan, Step(0)) is job.plan
