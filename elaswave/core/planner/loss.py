"""The plan after workers were lost or excluded: their hops and copies get new holders; nothing else changes."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from elaswave.core.ids import Epoch, Layer, ShardId, Step, WorkerId
from elaswave.core.placement import Placement
from elaswave.core.plan import Group, Plan, RouteTable
from elaswave.core.planner.callers import choose_callers
from elaswave.core.planner.context import PlanningContext, prune_tables, supersede
from elaswave.core.routes import reassign_hops
from elaswave.errors import FaultError


def plan_loss(context: PlanningContext, plan: Plan, lost: frozenset[WorkerId], slowest: Step, reason: str) -> Plan:
    """Give the dead workers' hops evenly to the other hosts of their layers, promote replicas, restore redundancy.

    A stage without survivors is hosted by the holders of copies of its shards. `slowest` is the lowest step that a
    member may be at. Raises FaultError where nobody is left.
    """
    members = tuple(member for member in plan.members if member.worker not in lost)
    if not members:
        raise FaultError(f"all {len(plan.members)} workers are lost: nobody is left to go on")
    epoch = Epoch(plan.epoch + 1)
    hosting = {worker: layers for worker, layers in plan.hosting.items() if worker not in lost}
    tables = prune_tables(plan.tables, slowest)
    candidates = _candidates(context, plan, hosting, tables, lost)
    for (first, last), workers in candidates.items():
        span = range(first, last)
        for worker in workers:
            hosting[worker] = tuple(sorted({*hosting.get(worker, ()), *(Layer(layer) for layer in span)}))
    routes = [reassign_hops(table.routes, lost, candidates, epoch) for table in tables]
    groups, queries, gates = promote(plan, lost, epoch)
    shrunk = supersede(
        plan,
        reason,
        members=members,
        hosting=hosting,
        tables=tuple(replace(table, routes=new) for table, new in zip(tables, routes, strict=True)),
        groups=groups,
        queries=queries,
        gates=gates,
        callers=choose_callers(plan.callers, members),
    )
    return restore_replicas(context, shrunk)


def _candidates(
    context: PlanningContext,
    plan: Plan,
    hosting: Mapping[WorkerId, tuple[Layer, ...]],
    tables: Sequence[RouteTable],
    lost: frozenset[WorkerId],
) -> dict[tuple[Layer, Layer], list[WorkerId]]:
    """For the layers of every lost hop, who can run them."""
    spans = {(hop.first, hop.last) for table in tables for route in table.routes for hop in route if hop.worker in lost}
    result: dict[tuple[Layer, Layer], list[WorkerId]] = {}
    for first, last in sorted(spans):
        span = {Layer(layer) for layer in range(first, last)}
        hosts = sorted(worker for worker, layers in hosting.items() if span <= set(layers))
        result[(first, last)] = hosts or _holders_of_copies(context, plan, span, lost)
    return result


def _holders_of_copies(
    context: PlanningContext, plan: Plan, span: set[Layer], lost: frozenset[WorkerId]
) -> list[WorkerId]:
    shards = {shard for layer in span for shard in context.shape.shards_of_layer[layer]}
    holders = {worker for shard in shards for worker in plan.groups[shard].everyone} - lost
    return sorted(holders or {member.worker for member in plan.members} - lost)


def promote(
    plan: Plan, lost: frozenset[WorkerId], epoch: Epoch
) -> tuple[tuple[Group, ...], dict[ShardId, Epoch], dict[ShardId, Epoch]]:
    """Groups without the lost workers: only a confirmed copy becomes owner (rules 5.2, 5.3)."""
    groups: list[Group] = []
    queries = dict(plan.queries)
    gates = dict(plan.gates)
    owned: dict[WorkerId, int] = {}
    for index, group in enumerate(plan.groups):
        shard = ShardId(index)
        if not lost & set(group.everyone):
            groups.append(group)
            continue
        replicas = _without(group.replicas, lost)
        joining = _without(group.joining, lost)
        owner = group.owner
        if owner is None or owner in lost:
            owner = min(replicas, key=lambda worker: (owned.get(worker, 0), worker), default=None)
            if owner is None:
                queries[shard] = epoch
            else:
                owned[owner] = owned.get(owner, 0) + 1
                replicas = _without(replicas, frozenset((owner,)))
        if not joining:
            gates.pop(shard, None)
        catch_up = _without(group.catch_up, lost)
        groups.append(Group(owner=owner, replicas=replicas, joining=joining, catch_up=catch_up))
    return tuple(groups), queries, gates


def _without(workers: tuple[WorkerId, ...], lost: frozenset[WorkerId]) -> tuple[WorkerId, ...]:
    return tuple(worker for worker in workers if worker not in lost)


def restore_replicas(context: PlanningContext, plan: Plan) -> Plan:
    """Add catch-up copies where a shard has fewer copies than wanted and somebody could hold one. Same epoch."""
    placement = Placement(plan.members)
    for index, group in enumerate(plan.groups):
        placement.count(group, context.shape.shards[index].elements)
    groups: list[Group] = []
    for index, group in enumerate(plan.groups):
        missing = context.replicas + 1 - len(group.everyone)
        if group.owner is None or missing <= 0:
            groups.append(group)
            continue
        catch_up = group.catch_up
        for _ in range(missing):
            taken = (*group.confirmed, *group.joining, *catch_up)
            found = placement.replica(group.owner, taken, context.shape.shards[index].elements)
            if found is not None:
                catch_up = (*catch_up, found)
        groups.append(replace(group, catch_up=catch_up))
    return replace(plan, groups=tuple(groups))
