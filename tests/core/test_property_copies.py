"""When a copy is confirmed and who may own a shard, against the rules in their own words (6.3, 5.3)."""

from dataclasses import replace
from itertools import combinations, product

from hypothesis import given, settings
from hypothesis import strategies as st
from planning_strategies import Job, check_plan, jobs

from elaswave.core.ids import Epoch, ShardId, Step, WorkerId
from elaswave.core.plan import Group, Plan
from elaswave.core.planner.context import MemberReport, Reports
from elaswave.core.planner.copies import StateIsGone, may_confirm, may_own, resolve_queries

SHARD = ShardId(0)
STEPS = st.integers(0, 3).map(Step)


@st.composite
def reports_of(draw: st.DrawFn, shards: int = 1) -> MemberReport:
    """A report of few steps and epochs, so that equal and adjacent ones are frequent; adoptions may have gaps."""
    epochs = sorted(draw(st.sets(st.integers(1, 5), min_size=1)))
    steps = sorted(draw(st.lists(STEPS, min_size=len(epochs), max_size=len(epochs))))
    held = draw(st.sets(st.integers(0, shards - 1)))
    return MemberReport(
        epoch=Epoch(epochs[-1]),
        step=Step(draw(st.integers(steps[-1], 4))),
        adopted_at={Epoch(epoch): step for epoch, step in zip(epochs, steps, strict=True)},
        versions={shard: draw(st.integers(0, 4)) for shard in held},
        reduced={
            shard: tuple(draw(st.lists(STEPS, max_size=2))) for shard in draw(st.sets(st.integers(0, shards - 1)))
        },
    )


def draw_reports(data: st.DataObject, plan: Plan) -> Reports:
    """Reports of most members."""
    found = reports_of(len(plan.groups))
    return {worker: data.draw(found) for worker in sorted(plan.ids) if data.draw(st.integers(0, 7)) > 0}


def naive_confirm(plan: Plan, reports: Reports, worker: WorkerId) -> bool:
    """All members have adopted the gate, or a later plan, and were not above x's version at that moment."""
    if SHARD not in plan.gates or worker not in reports or SHARD not in reports[worker].versions:
        return False
    for member in plan.members:
        if member.worker not in reports:
            return False
        adopted = sorted(reports[member.worker].adopted_at.items())
        moments = [step for epoch, step in adopted if epoch >= plan.gates[SHARD]]
        if not moments or reports[worker].versions[SHARD] < moments[0]:
            return False
    return True


@given(jobs(), st.data())
@settings(max_examples=100)
def test_a_copy_is_confirmed_by_the_rule(job: Job, data: st.DataObject) -> None:
    gates = {SHARD: Epoch(data.draw(st.integers(1, 4)))} if data.draw(st.integers(0, 7)) else {}
    plan = replace(job.plan, epoch=Epoch(5), gates=gates)
    reports = draw_reports(data, plan)
    for worker in plan.ids:
        assert may_confirm(plan, reports, worker, SHARD) == naive_confirm(plan, reports, worker)


@given(jobs(smallest=2), st.data())
@settings(max_examples=60)
def test_one_member_above_the_version_at_the_gate_is_enough_to_wait(job: Job, data: st.DataObject) -> None:
    plan = replace(job.plan, epoch=Epoch(3), gates={SHARD: Epoch(2)})
    at = Step(data.draw(STEPS))
    report = MemberReport(
        epoch=Epoch(3), step=at, adopted_at={Epoch(2): at, Epoch(3): Step(at + 9)}, versions={0: at}, reduced={}
    )
    reports = dict.fromkeys(plan.ids, report)
    mine, other = data.draw(st.permutations(sorted(plan.ids)))[:2]
    assert may_confirm(plan, reports, mine, SHARD)
    ahead = replace(report, adopted_at={Epoch(2): Step(at + 1)})
    assert not may_confirm(plan, {**reports, other: ahead}, mine, SHARD)
    assert not may_confirm(plan, {**reports, other: replace(report, adopted_at={Epoch(1): Step(0)})}, mine, SHARD)
    assert not may_confirm(plan, {w: r for w, r in reports.items() if w != other}, mine, SHARD)
    assert not may_confirm(replace(plan, gates={}), reports, mine, SHARD)


def naive_own(report: MemberReport, shard: int, top: int) -> bool:
    """At the highest step; or one behind, with the gradient, on a worker that is one behind itself."""
    if shard not in report.versions:
        return False
    at_top = report.versions[shard] == top
    behind = report.versions[shard] + 1 == top and report.step + 1 == top
    return at_top or (behind and top - 1 in report.reduced.get(shard, ()))


def test_who_may_own_follows_the_rule() -> None:
    """All cases of four steps."""
    gradients = [found for size in range(5) for found in combinations(map(Step, range(4)), size)]
    for version, step, top, reduced in product((None, 0, 1, 2, 3), range(4), range(4), gradients):
        versions = {} if version is None else {0: version}
        report = MemberReport(epoch=Epoch(1), step=Step(step), adopted_at={}, versions=versions, reduced={0: reduced})
        assert may_own(report, SHARD, Step(top)) == naive_own(report, SHARD, top)


@given(jobs(), st.data())
@settings(max_examples=100)
def test_owners_are_found_when_all_have_adopted_and_only_where_the_rule_allows(job: Job, data: st.DataObject) -> None:
    asked = data.draw(st.sets(st.integers(0, len(job.plan.groups) - 1), max_size=2))
    queries = {ShardId(shard): Epoch(data.draw(st.integers(1, 3))) for shard in asked}
    groups = [
        Group(owner=None, catch_up=group.everyone) if index in asked else group
        for index, group in enumerate(job.plan.groups)
    ]
    plan = replace(job.plan, epoch=Epoch(5), queries=queries, groups=tuple(groups))
    reports = draw_reports(data, plan)
    answer = resolve_queries(job.context, plan, reports)
    newest = max(queries.values(), default=None)
    if newest is None or any(w not in reports or reports[w].epoch < newest for w in plan.ids):
        assert answer is None
        return
    top = max(report.step for report in reports.values())
    able = {shard: {w for w in plan.ids if naive_own(reports[w], shard, top)} for shard in asked}
    lost = {shard for shard, found in able.items() if not found}
    if lost:
        assert isinstance(answer, StateIsGone)
        assert set(answer.shards) == lost
        return
    assert isinstance(answer, Plan)
    check_plan(job.context, answer)
    assert not answer.queries
    for index, (was, now) in enumerate(zip(plan.groups, answer.groups, strict=True)):
        if index not in asked:
            assert now == was
            continue
        assert now.owner in able[index]
        assert now.confirmed == (now.owner,)
        assert set(was.everyone) <= set(now.everyone)
