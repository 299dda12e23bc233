"""Life of a copy, owners by facts, return of suspects: against naive restatements of rules 5.3, 5.6, 5.8 and 6."""

import random
from dataclasses import dataclass, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from elaswave.core.ids import BlockId, Epoch, Layer, NodeId, ShardId, Step, WorkerId
from elaswave.core.layout import Stage
from elaswave.core.plan import Group, Hop, Member, Plan, RouteTable
from elaswave.core.planner.context import MemberReport, PlanningContext
from elaswave.core.planner.copies import StateIsGone, advance_copies, may_own, resolve_queries
from elaswave.core.planner.join import may_bring, may_return, plan_join
from elaswave.core.shape import CHUNK_ELEMENTS, Block, ModelShape, Shard

EPOCH = Epoch(9)


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A plan with copies in all stages of their life, what was reported, and swaps under way."""

    context: PlanningContext
    plan: Plan
    reports: dict[WorkerId, MemberReport]
    swaps: frozenset[tuple[ShardId, WorkerId]]


def shape_of(shards: int) -> ModelShape:
    cut = tuple(Shard(block=BlockId(0), start=s * CHUNK_ELEMENTS, stop=(s + 1) * CHUNK_ELEMENTS) for s in range(shards))
    return ModelShape(1, (Block(layers=(Layer(0),), elements=shards * CHUNK_ELEMENTS),), cut)


def members_of(count: int) -> tuple[Member, ...]:
    return tuple(
        Member(worker=WorkerId(w), node=NodeId(f"n{w % 3}"), local_index=0, incarnation=0) for w in range(count)
    )


@st.composite
def groups(draw: st.DrawFn, workers: int, ownerless: bool) -> Group:
    order = draw(st.permutations([WorkerId(w) for w in range(workers)]))
    ends = sorted(draw(st.lists(st.integers(1, workers), min_size=3, max_size=3)))
    owner = None if ownerless else order[0]
    replicas = () if ownerless else tuple(order[1 : ends[0]])
    return Group(
        owner=owner,
        replicas=replicas,
        joining=tuple(order[ends[0] : ends[1]]),
        catch_up=tuple(order[ends[1] : ends[2]]),
    )


@st.composite
def member_reports(draw: st.DrawFn, shards: int) -> MemberReport:
    epoch = draw(st.integers(EPOCH - 4, EPOCH))
    first = draw(st.integers(EPOCH - 6, epoch))
    steps = sorted(draw(st.lists(st.integers(3, 6), min_size=epoch - first + 1, max_size=epoch - first + 1)))
    step = max(steps[-1], draw(st.integers(3, 6)))
    held = draw(st.lists(st.integers(0, shards - 1), unique=True))
    return MemberReport(
        epoch=Epoch(epoch),
        step=Step(step),
        adopted_at={Epoch(first + i): Step(found) for i, found in enumerate(steps)},
        versions={shard: draw(st.integers(step - 2, step)) for shard in held},
        reduced={shard: (Step(draw(st.integers(step - 1, step))),) for shard in held},
        hosted_ready=draw(st.booleans()),
    )


@st.composite
def cases(draw: st.DrawFn, queries: bool = False) -> Case:
    workers, shards = draw(st.integers(2, 6)), draw(st.integers(1, 4))
    members = members_of(workers)
    lost = [draw(st.booleans()) if queries else draw(st.integers(0, 9)) == 0 for _ in range(shards)]
    found = tuple(draw(groups(workers, gone)) for gone in lost)
    asked = {ShardId(s): Epoch(draw(st.integers(EPOCH - 4, EPOCH))) for s, gone in enumerate(lost) if gone}
    gates = {ShardId(s): Epoch(draw(st.integers(EPOCH - 4, EPOCH))) for s, group in enumerate(found) if group.joining}
    hop = Hop(worker=WorkerId(0), epoch=Epoch(1), first=Layer(0), last=Layer(1))
    plan = Plan(
        epoch=EPOCH,
        reason="",
        members=members,
        hosting={member.worker: (Layer(0),) for member in members},
        tables=(RouteTable(first_step=Step(0), routes=((hop,),)),),
        groups=found,
        queries=asked,
        gates=gates,
    )
    context = PlanningContext(
        shape=shape_of(shards),
        stages=(Stage(first=Layer(0), last=Layer(1)),),
        replicas=draw(st.integers(0, 2)),
        micro_batches=1,
    )
    reports = {member.worker: draw(member_reports(shards)) for member in members if draw(st.integers(0, 9)) > 0}
    swaps = frozenset(
        (ShardId(s), worker)
        for s, group in enumerate(found)
        for worker in group.joining + group.catch_up
        if draw(st.integers(0, 2)) == 0
    )
    return Case(context=context, plan=plan, reports=reports, swaps=swaps)


def shuffled(case: Case, rng: random.Random) -> Case:
    """The same, told in another order."""

    def mixed(found: dict[WorkerId, MemberReport]) -> dict[WorkerId, MemberReport]:
        items = list(found.items())
        rng.shuffle(items)
        return dict(items)

    members = list(case.plan.members)
    rng.shuffle(members)
    plan = replace(case.plan, members=tuple(members), hosting=dict(reversed(list(case.plan.hosting.items()))))
    return replace(case, plan=plan, reports=mixed(case.reports))


# ---------------------------------------------------------------------- gate and confirm


def naive_may_confirm(case: Case, shard: ShardId, worker: WorkerId) -> bool:
    """Rule 6.3: everybody has told of adopting the gate, or a later plan, at a step not above the copy's version."""
    mine = case.reports.get(worker)
    if mine is None or shard not in mine.versions:
        return False
    for member in case.plan.members:
        report = case.reports.get(member.worker)
        if report is None:
            return False
        told = sorted(epoch for epoch in report.adopted_at if epoch >= case.plan.gates[shard])
        if not told or report.adopted_at[told[0]] > mine.versions[shard]:
            return False
    return True


def naive_group(case: Case, shard: ShardId) -> tuple[Group, bool]:
    """The group after one round, and whether some copy begins to gate."""
    group = case.plan.groups[shard]
    if group.owner is None:
        return group, False
    owner, replicas, joining = group.owner, list(group.replicas), list(group.joining)
    for worker in group.joining:
        if naive_may_confirm(case, shard, worker):
            joining.remove(worker)
            if (shard, worker) in case.swaps:
                if len(replicas) < case.context.replicas:
                    replicas.insert(0, owner)
                owner = worker
            else:
                replicas.append(worker)
    catch_up = list(group.catch_up)
    begins = []
    if not joining:
        for worker in group.catch_up:
            report = case.reports.get(worker)
            if report is not None and report.epoch == EPOCH and shard in report.versions:
                begins.append(worker)
                catch_up.remove(worker)
    return (
        Group(owner=owner, replicas=tuple(replicas), joining=tuple(joining + begins), catch_up=tuple(catch_up)),
        bool(begins),
    )


@given(cases(), st.randoms(use_true_random=False))
@settings(max_examples=300)
def test_copies_advance_as_the_rules_say(case: Case, rng: random.Random) -> None:
    made = advance_copies(case.context, case.plan, case.reports, case.swaps)
    expected = [naive_group(case, ShardId(s)) for s in range(len(case.plan.groups))]
    if all(group == case.plan.groups[s] for s, (group, _) in enumerate(expected)):
        assert made is None
    else:
        assert made is not None
        assert made.groups == tuple(group for group, _ in expected)
        assert made.epoch == EPOCH + 1
        for s, (group, begins) in enumerate(expected):
            if begins:
                assert made.gates[ShardId(s)] == EPOCH + 1
            elif group.joining and group.owner is not None:
                assert made.gates[ShardId(s)] == case.plan.gates[ShardId(s)]
            elif group.owner is not None:
                assert ShardId(s) not in made.gates
        # Nothing but copies changes, and no copy is dropped but those that a swap has taken the shard from: the owner
        # before, and where several are swapped in at once, all but the last.
        same = replace(made, epoch=EPOCH, reason="", groups=case.plan.groups, gates=case.plan.gates)
        assert same == case.plan
        for s, (was, now) in enumerate(zip(case.plan.groups, made.groups, strict=True)):
            swapped = {was.owner} | {worker for shard, worker in case.swaps if shard == s and worker in was.joining}
            assert set(was.everyone) - set(now.everyone) <= (swapped - {now.owner} if was.owner != now.owner else set())
            assert len(now.confirmed) >= min(len(was.confirmed), case.context.replicas + 1)
    again = shuffled(case, rng)
    other = advance_copies(again.context, again.plan, again.reports, again.swaps)
    assert (other and (other.groups, other.gates)) == (made and (made.groups, made.gates))


def test_a_member_that_came_after_the_gate_does_not_hold_up_its_confirmation() -> None:
    plan = _plan((Group(owner=WorkerId(0), joining=(WorkerId(1),)),), gates={ShardId(0): Epoch(7)})
    reports = {
        WorkerId(0): _report(adopted={Epoch(7): Step(2)}, step=4, versions={0: 4}),
        WorkerId(1): _report(adopted={Epoch(7): Step(2)}, step=4, versions={0: 4}),
        WorkerId(2): _report(adopted={Epoch(8): Step(0)}, step=3),
    }
    made = advance_copies(_context(), plan, reports, frozenset())
    assert made is not None
    assert made.groups[0].replicas == (WorkerId(1),)


def test_a_swap_keeps_the_old_owner_where_replicas_are_missing() -> None:
    group = Group(owner=WorkerId(0), replicas=(WorkerId(1),), joining=(WorkerId(2),))
    plan = _plan((group,), gates={ShardId(0): Epoch(7)})
    reports = {WorkerId(w): _report(adopted={Epoch(7): Step(2)}, step=4, versions={0: 4}) for w in range(3)}
    swaps = frozenset({(ShardId(0), WorkerId(2))})
    for replicas, expected in ((1, (1,)), (2, (0, 1))):
        made = advance_copies(_context(replicas), plan, reports, swaps)
        assert made is not None
        assert made.groups[0].owner == 2
        assert made.groups[0].replicas == expected


# ---------------------------------------------------------------------- owners by facts


@given(cases(queries=True), st.randoms(use_true_random=False))
@settings(max_examples=300)
def test_owners_are_found_by_facts_or_the_state_is_gone(case: Case, rng: random.Random) -> None:
    found = resolve_queries(case.context, case.plan, case.reports)
    reports = [case.reports.get(member.worker) for member in case.plan.members]
    asked = max(case.plan.queries.values(), default=None)
    if asked is None or any(report is None or report.epoch < asked for report in reports):
        assert found is None
        return
    top = max(report.step for report in reports if report is not None)
    able = {
        shard: sorted(
            worker
            for worker in case.plan.ids
            if case.reports[worker].versions.get(shard) == top
            or (
                case.reports[worker].versions.get(shard) == case.reports[worker].step == top - 1
                and top - 1 in case.reports[worker].reduced[shard]
            )
        )
        for shard in case.plan.queries
    }
    gone = tuple(shard for shard in case.plan.queries if not able[shard])
    if gone:
        assert found == StateIsGone(shards=gone)
        return
    assert isinstance(found, Plan)
    assert not found.queries
    for shard, workers in able.items():
        group = found.groups[shard]
        assert group.owner == workers[0]
        assert group.replicas == group.joining == ()
        assert set(case.plan.groups[shard].everyone) - {workers[0]} <= set(group.catch_up)
        assert len(group.everyone) >= min(case.context.replicas + 1, len(case.plan.members))
    again = shuffled(case, rng)
    other = resolve_queries(again.context, again.plan, again.reports)
    assert isinstance(other, Plan)
    assert other.groups == found.groups


@pytest.mark.parametrize(
    ("version", "step", "reduced", "able"),
    [
        (5, 5, (), True),
        (4, 4, (4,), True),
        (4, 5, (4,), False),
        (4, 4, (3,), False),
        (4, 4, (), False),
        (3, 3, (3,), False),
    ],
)
def test_who_may_own(version: int, step: int, reduced: tuple[int, ...], able: bool) -> None:
    report = _report(adopted={}, step=step, versions={0: version}, reduced={0: reduced})
    assert may_own(report, ShardId(0), Step(5)) == able


# ---------------------------------------------------------------------- return of suspects


def test_a_suspect_returns_when_it_follows_and_knows_nothing_more() -> None:
    plan = _plan((Group(owner=WorkerId(0), replicas=(WorkerId(1),)),))
    suspect = WorkerId(7)
    assert not may_return(plan, {}, suspect, Step(4))
    behind = {suspect: _report(adopted={}, step=4, epoch=8)}
    assert not may_return(plan, behind, suspect, Step(4))
    follows = {suspect: _report(adopted={}, step=4)}
    assert may_return(plan, follows, suspect, Step(4))
    assert may_return(plan, follows, suspect, Step(5))
    assert not may_return(plan, follows, suspect, Step(3))


@pytest.mark.parametrize(
    ("version", "reduced", "returns"),
    [(5, (), True), (4, (4,), True), (4, (), False), (3, (4,), False)],
)
def test_a_suspect_that_is_ahead_returns_if_the_owner_can_follow(
    version: int, reduced: tuple[int, ...], returns: bool
) -> None:
    plan = _plan((Group(owner=WorkerId(0)),))
    reports = {
        WorkerId(7): _report(adopted={}, step=5),
        WorkerId(0): _report(adopted={}, step=min(version, 4), versions={0: version}, reduced={0: reduced}),
    }
    assert may_return(plan, reports, WorkerId(7), Step(4)) == returns


def test_a_suspect_that_is_ahead_returns_with_the_copy_of_an_ownerless_shard() -> None:
    plan = _plan((Group(owner=None),), queries={ShardId(0): EPOCH})
    members = {WorkerId(w): _report(adopted={}, step=4) for w in range(3)}
    holder = {**members, WorkerId(7): _report(adopted={}, step=5, versions={0: 5})}
    assert may_return(plan, holder, WorkerId(7), Step(4))
    assert may_bring(plan, holder, WorkerId(7), plan.queries, Step(4))
    empty = {**members, WorkerId(7): _report(adopted={}, step=5)}
    assert not may_return(plan, empty, WorkerId(7), Step(4))
    assert not may_bring(plan, empty, WorkerId(7), plan.queries, Step(4))
    silent = {**members, WorkerId(7): _report(adopted={}, step=5, epoch=8)}
    assert may_bring(plan, silent, WorkerId(7), plan.queries, Step(4))
    assert may_bring(plan, members, WorkerId(7), plan.queries, Step(4))


@given(cases(), st.randoms(use_true_random=False))
def test_joining_is_the_same_in_any_order_and_takes_a_fair_share(case: Case, rng: random.Random) -> None:
    joiner = Member(worker=WorkerId(20), node=NodeId("new"), local_index=0, incarnation=0)
    joined = plan_join(case.context, case.plan, (joiner,), "joins")
    again = shuffled(case, rng)
    assert plan_join(again.context, again.plan, (joiner,), "joins") == joined
    assert joined.plan.hosting[joiner.worker] == (Layer(0),)
    assert joined.plan.tables == case.plan.tables
    shards = len(case.plan.groups)
    assert len(joined.swaps) <= -(-shards // len(joined.plan.members)) + 1
    for shard, worker in joined.swaps:
        assert worker == joiner.worker
        assert worker in joined.plan.groups[shard].catch_up


def _context(replicas: int = 1) -> PlanningContext:
    stages = (Stage(first=Layer(0), last=Layer(1)),)
    return PlanningContext(shape=shape_of(1), stages=stages, replicas=replicas, micro_batches=1)


def _plan(
    found: tuple[Group, ...],
    gates: dict[ShardId, Epoch] | None = None,
    queries: dict[ShardId, Epoch] | None = None,
) -> Plan:
    members = members_of(3)
    hop = Hop(worker=WorkerId(0), epoch=Epoch(1), first=Layer(0), last=Layer(1))
    return Plan(
        epoch=EPOCH,
        reason="",
        members=members,
        hosting={member.worker: (Layer(0),) for member in members},
        tables=(RouteTable(first_step=Step(0), routes=((hop,),)),),
        groups=found,
        queries=queries or {},
        gates=gates or {},
    )


def _report(
    *,
    adopted: dict[Epoch, Step],
    step: int,
    versions: dict[int, int] | None = None,
    reduced: dict[int, tuple[int, ...]] | None = None,
    epoch: int = EPOCH,
) -> MemberReport:
    return MemberReport(
        epoch=Epoch(epoch),
        step=Step(step),
        adopted_at=adopted,
        versions=versions or {},
        reduced={shard: tuple(Step(s) for s in found) for shard, found in (reduced or {}).items()},
    )
