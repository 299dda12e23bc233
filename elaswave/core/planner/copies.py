"""Life of a copy: catch-up, joining, confirmed (rule 6), and shards that lost every confirmed copy (rule 5.3)."""

from dataclasses import dataclass, replace

from elaswave.core.ids import Epoch, ShardId, Step, WorkerId
from elaswave.core.plan import Group, Plan
from elaswave.core.planner.context import MemberReport, PlanningContext, Reports, supersede
from elaswave.core.planner.loss import restore_replicas


@dataclass(frozen=True, slots=True, kw_only=True)
class StateIsGone:
    """No copy of these shards can be proven complete: fall back to a durable checkpoint."""

    shards: tuple[ShardId, ...]


def advance_copies(
    context: PlanningContext, plan: Plan, reports: Reports, swaps: frozenset[tuple[ShardId, WorkerId]]
) -> Plan | None:
    """The next plan of copies that are under way, or None where nothing may be done yet.

    `swaps` are copies that shall become owners when they are confirmed.
    """
    groups = list(plan.groups)
    gates = dict(plan.gates)
    epoch = Epoch(plan.epoch + 1)
    gated: list[ShardId] = []
    confirmed: list[ShardId] = []
    for index, group in enumerate(plan.groups):
        shard = ShardId(index)
        if group.owner is None:
            continue
        now = _confirm(context, plan, reports, shard, swaps)
        if now != group:
            confirmed.append(shard)
        ready = tuple(w for w in now.catch_up if holds_copy(plan, reports, w, shard)) if not now.joining else ()
        if ready:
            now = replace(now, joining=ready, catch_up=tuple(w for w in now.catch_up if w not in ready))
            gates[shard] = epoch
            gated.append(shard)
        elif not now.joining:
            gates.pop(shard, None)
        groups[index] = now
    if not gated and not confirmed:
        return None
    reason = f"copies: {len(confirmed)} confirmed, {len(gated)} begin to gate decisions"
    return supersede(plan, reason, groups=tuple(groups), gates=gates)


def holds_copy(plan: Plan, reports: Reports, worker: WorkerId, shard: ShardId) -> bool:
    """The worker has the copy; counts only from a worker that has adopted the newest plan (rule 6.2)."""
    report = reports.get(worker)
    return report is not None and report.epoch == plan.epoch and shard in report.versions


def _confirm(
    context: PlanningContext, plan: Plan, reports: Reports, shard: ShardId, swaps: frozenset[tuple[ShardId, WorkerId]]
) -> Group:
    group = plan.groups[shard]
    for worker in group.joining:
        if may_confirm(plan, reports, worker, shard):
            joining = tuple(w for w in group.joining if w != worker)
            if (shard, worker) in swaps:
                group = replace(group, owner=worker, replicas=_kept(group, context.replicas), joining=joining)
            else:
                group = replace(group, replicas=(*group.replicas, worker), joining=joining)
    return group


def _kept(group: Group, wanted: int) -> tuple[WorkerId, ...]:
    """Replicas beside a new owner: the old owner stays on as one where there are too few without it."""
    return group.replicas if len(group.replicas) >= wanted else group.confirmed


def may_confirm(plan: Plan, reports: Reports, worker: WorkerId, shard: ShardId) -> bool:
    """All members have adopted the plan that made the copy gate, at steps not above its version (rule 6.3)."""
    gate = plan.gates.get(shard)
    mine = reports.get(worker)
    if gate is None or mine is None or shard not in mine.versions:
        return False
    steps = [_gated_at(reports.get(member.worker), gate) for member in plan.members]
    return all(step is not None and mine.versions[shard] >= step for step in steps)


def _gated_at(report: MemberReport | None, gate: Epoch) -> Step | None:
    """The step of a member when it adopted `gate`, or the first later plan that it has told of: it may have been let
    in since, or have told of `gate` before it was suspected. A later step only asks for more."""
    later = [epoch for epoch in report.adopted_at if epoch >= gate] if report is not None else []
    return report.adopted_at[min(later)] if report is not None and later else None


def resolve_queries(context: PlanningContext, plan: Plan, reports: Reports) -> Plan | StateIsGone | None:
    """Owners for shards that have none, by facts; None while some member has not adopted the asking plan (rule 5.3)."""
    if not plan.queries:
        return None
    asked = max(plan.queries.values())
    members = [reports.get(member.worker) for member in plan.members]
    if any(report is None or report.epoch < asked for report in members):
        return None
    top = max(report.step for report in members if report is not None)
    groups = list(plan.groups)
    gates = dict(plan.gates)
    lost: list[ShardId] = []
    for shard in plan.queries:
        group = plan.groups[shard]
        able = sorted(worker for worker in plan.ids if may_own(reports[worker], shard, top))
        if not able:
            lost.append(shard)
            continue
        rest = tuple(worker for worker in group.everyone if worker != able[0])
        groups[shard] = Group(owner=able[0], catch_up=rest)
        gates.pop(shard, None)
    if lost:
        return StateIsGone(shards=tuple(lost))
    reason = f"owners found by facts for {len(plan.queries)} shards"
    return restore_replicas(context, supersede(plan, reason, groups=tuple(groups), gates=gates, queries={}))


def may_own(report: MemberReport, shard: ShardId, top: Step) -> bool:
    """The copy is at the highest decided step, or one behind with the gradient on a worker that is one behind too."""
    version = report.versions.get(shard)
    if version == top:
        return True
    behind = Step(top - 1)
    return version == behind and report.step == behind and behind in report.reduced.get(shard, ())
