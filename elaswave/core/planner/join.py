"""Joining workers: host a stage, fetch copies, then take routes from an announced step on (rules 6, 7.4)."""

from collections.abc import Iterable
from dataclasses import dataclass, replace

from elaswave.core.ids import Epoch, ShardId, Step, WorkerId
from elaswave.core.layout import Stage
from elaswave.core.placement import Placement
from elaswave.core.plan import Group, Member, Plan, RouteTable
from elaswave.core.planner.callers import choose_callers
from elaswave.core.planner.context import PlanningContext, Reports, prune_tables, supersede
from elaswave.core.planner.copies import may_own
from elaswave.core.planner.initial import stage_hosts
from elaswave.core.planner.loss import restore_replicas
from elaswave.core.routes import balanced_routes


@dataclass(frozen=True, slots=True, kw_only=True)
class JoinPlan:
    """The plan that lets workers in, and the copies that shall become owners once confirmed."""

    plan: Plan
    swaps: frozenset[tuple[ShardId, WorkerId]]


def plan_join(context: PlanningContext, plan: Plan, joiners: tuple[Member, ...], reason: str) -> JoinPlan:
    """Let workers in: each hosts the stage with the fewest hosts of its own and begins to fetch its share of shards."""
    members = tuple(sorted((*plan.members, *joiners), key=lambda member: member.worker))
    grown = supersede(plan, reason, members=members, callers=choose_callers(plan.callers, members))
    swaps: set[tuple[ShardId, WorkerId]] = set()
    for joiner in joiners:
        stage = _neediest_stage(context, grown)
        grown = replace(grown, hosting={**grown.hosting, joiner.worker: stage.layers})
        promised = frozenset(shard for shard, _ in swaps)
        groups, found = _share_of(context, grown, stage, joiner.worker, promised)
        grown = replace(grown, groups=groups)
        swaps |= found
    return JoinPlan(plan=restore_replicas(context, grown), swaps=frozenset(swaps))


def _neediest_stage(context: PlanningContext, plan: Plan) -> Stage:
    def own_hosts(stage: Stage) -> int:
        return sum(layers == stage.layers for layers in plan.hosting.values())

    return min(context.stages, key=lambda stage: (own_hosts(stage), stage.first))


def _share_of(
    context: PlanningContext, plan: Plan, stage: Stage, joiner: WorkerId, promised: frozenset[ShardId]
) -> tuple[tuple[Group, ...], frozenset[tuple[ShardId, WorkerId]]]:
    """Shards of the stage whose ownership the joiner takes over, from the owners that have most."""
    placement = Placement(plan.members)
    for index, group in enumerate(plan.groups):
        placement.count(group, context.shape.shards[index].elements)
    shards = sorted({shard for layer in stage.layers for shard in context.shape.shards_of_layer[layer]})
    hosts = [worker for worker, layers in plan.hosting.items() if set(stage.layers) <= set(layers)]
    fair = sum(context.shape.shards[shard].elements for shard in shards) / max(1, len(hosts))
    groups = list(plan.groups)
    taken = 0
    swaps: set[tuple[ShardId, WorkerId]] = set()
    load = dict(placement.owned)

    def owner_load(shard: ShardId) -> tuple[int, ShardId]:
        owner = groups[shard].owner
        return (-load.get(owner, 0) if owner is not None else 0, shard)

    remaining = [shard for shard in shards if shard not in promised]
    while remaining and taken < fair:
        shard = min(remaining, key=owner_load)
        remaining.remove(shard)
        group, size = groups[shard], context.shape.shards[shard].elements
        if group.owner is None or joiner in group.everyone or taken + size / 2 > fair:
            continue
        groups[shard] = replace(group, catch_up=(*group.catch_up, joiner))
        load[group.owner] -= size
        taken += size
        swaps.add((shard, joiner))
    return tuple(groups), frozenset(swaps)


def plan_routes(context: PlanningContext, plan: Plan, first_step: Step, slowest: Step, reason: str) -> Plan:
    """Deal the micro-batches evenly over all hosts from `first_step` on; steps under way keep their routes."""
    epoch = Epoch(plan.epoch + 1)
    hosts = stage_hosts(context.stages, plan)
    table = RouteTable(
        first_step=first_step, routes=balanced_routes(context.stages, hosts, context.micro_batches, epoch)
    )
    kept = tuple(old for old in prune_tables(plan.tables, slowest) if old.first_step < first_step)
    return supersede(plan, reason, tables=(*kept, table))


def may_return(plan: Plan, reports: Reports, worker: WorkerId, fastest: Step) -> bool:
    """A suspect that is alive may be let in again, as a joiner (rule 5.6).

    It has adopted the newest plan, and either knows of no decision that no member knows of (`fastest` is the highest
    step of the members), or every shard survives that decision. It may have decided a step in an old view, without
    copies that were confirmed since: telling of it would leave them without the gradient for ever.
    """
    report = reports.get(worker)
    if report is None or report.epoch != plan.epoch:
        return False
    return report.step <= fastest or all(
        _survives(plan, reports, ShardId(shard), report.step) for shard in range(len(plan.groups))
    )


def _survives(plan: Plan, reports: Reports, shard: ShardId, top: Step) -> bool:
    """The owner can follow to step `top`; where there is none, somebody can that is alive and up to date."""
    owner = plan.groups[shard].owner
    holders = [worker for worker, report in reports.items() if report.epoch == plan.epoch] if owner is None else [owner]
    return any(may_own(reports[holder], shard, top) for holder in holders if holder in reports)


def may_bring(plan: Plan, reports: Reports, worker: WorkerId, shards: Iterable[ShardId], fastest: Step) -> bool:
    """The return of a suspect may bring a copy of one of `shards` back; it counts as long as it has not told."""
    report = reports.get(worker)
    if report is None or report.epoch < plan.epoch:
        return True
    return any(shard in report.versions for shard in shards) and may_return(plan, reports, worker, fastest)
