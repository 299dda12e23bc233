"""Plans: a loss changes what names the lost and nothing else; joins and even routes keep all that must hold."""

from collections.abc import Iterable
from dataclasses import dataclass, replace

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from planning_strategies import Job, check_plan, jobs

from elaswave.core.ids import Epoch, NodeId, ShardId, Step, WorkerId
from elaswave.core.plan import Group, Member, Plan
from elaswave.core.planner.context import MemberReport, PlanningContext, Reports
from elaswave.core.planner.copies import StateIsGone, advance_copies, resolve_queries
from elaswave.core.planner.join import plan_join, plan_routes
from elaswave.core.planner.loss import plan_loss
from elaswave.core.routes import moved_hops
from elaswave.errors import FaultError

Lost = frozenset[WorkerId]


def draw_lost(data: st.DataObject, plan: Plan) -> Lost:
    """Some members, never all."""
    ids = sorted(plan.ids)
    return frozenset(data.draw(st.lists(st.sampled_from(ids), unique=True, min_size=1, max_size=len(ids) - 1)))


def named(plan: Plan) -> set[WorkerId]:
    """All workers that the plan mentions anywhere."""
    hops = {hop.worker for table in plan.tables for route in table.routes for hop in route}
    copies = {worker for group in plan.groups for worker in group.everyone}
    return hops | copies | set(plan.hosting) | {member.worker for member in plan.members}


def check_loss(context: PlanningContext, old: Plan, new: Plan, lost: Lost, slowest: Step = Step(0)) -> None:
    """What a loss may change, given that `old` had no shortage of copies."""
    check_plan(context, new)
    assert new.epoch == old.epoch + 1
    assert not named(new) & lost
    assert new.members == tuple(member for member in old.members if member.worker not in lost)
    for step in map(Step, range(slowest, slowest + 12)):
        assert new.table(step).first_step == old.table(step).first_step
    for table in new.tables:
        was = next(found for found in old.tables if found.first_step == table.first_step)
        for _, hop in moved_hops(was.routes, table.routes):
            assert hop.epoch == new.epoch
        kept = [(i, hop) for i, route in enumerate(was.routes) for hop in route if hop.worker not in lost]
        assert all(hop in table.routes[index] for index, hop in kept)
    check_hosting(context, old, new, lost)
    for index, (was_group, group) in enumerate(zip(old.groups, new.groups, strict=True)):
        if not lost & set(was_group.everyone):
            assert group == was_group
            continue
        left = [worker for worker in was_group.confirmed if worker not in lost]
        assert set(group.confirmed) == set(left)
        assert (group.owner is None) == (not left)
        assert set(group.joining) == set(was_group.joining) - lost
        assert set(group.catch_up) >= set(was_group.catch_up) - lost
        if was_group.owner is not None and was_group.owner not in lost:
            assert group.owner == was_group.owner
        if not left:
            assert new.queries[ShardId(index)] == new.epoch


def check_hosting(context: PlanningContext, old: Plan, new: Plan, lost: Lost) -> None:
    """Survivors host what they hosted; orphaned stages are hosted by all who hold copies of them, else by all."""
    expected = {worker: set(layers) for worker, layers in old.hosting.items() if worker not in lost}
    for stage in context.stages:
        if any(set(stage.layers) <= set(old.hosting[worker]) for worker in old.ids - lost):
            continue
        shards = {shard for layer in stage.layers for shard in context.shape.shards_of_layer[layer]}
        holders = {worker for shard in shards for worker in old.groups[shard].everyone} - lost
        for worker in holders or set(expected):
            expected[worker] |= set(stage.layers)
    assert {worker: set(layers) for worker, layers in new.hosting.items()} == expected


@given(jobs())
@settings(max_examples=60)
def test_the_first_plan_keeps_all_that_must_hold(job: Job) -> None:
    check_plan(job.context, job.plan)
    assert job.plan.epoch == 1
    assert not job.plan.queries
    assert all(not group.joining and not group.catch_up for group in job.plan.groups)


@given(jobs(smallest=2), st.data())
@settings(max_examples=100)
def test_a_loss_changes_what_names_the_lost_and_nothing_else(job: Job, data: st.DataObject) -> None:
    lost = draw_lost(data, job.plan)
    check_loss(job.context, job.plan, plan_loss(job.context, job.plan, lost, Step(0), "lost"), lost)


@given(jobs(smallest=2), st.data())
@settings(max_examples=60)
def test_plans_do_not_depend_on_the_order_of_members_and_mappings(job: Job, data: st.DataObject) -> None:
    assert job.first_plan(data.draw(st.permutations(job.members))) == job.plan
    lost = draw_lost(data, job.plan)
    hosting = dict(data.draw(st.permutations(list(job.plan.hosting.items()))))
    turned = replace(job.plan, members=tuple(data.draw(st.permutations(job.members))), hosting=hosting)
    found = plan_loss(job.context, turned, lost, Step(0), "lost")
    ordered = tuple(sorted(found.members, key=lambda member: member.worker))
    assert replace(found, members=ordered) == plan_loss(job.context, job.plan, lost, Step(0), "lost")


@given(jobs(), st.integers(1, 4))
@settings(max_examples=60)
def test_nobody_left_is_an_error(job: Job, more: int) -> None:
    with pytest.raises(FaultError, match=f"all {len(job.members)} workers are lost"):
        plan_loss(job.context, job.plan, job.plan.ids | {WorkerId(99 + more)}, Step(0), "lost")


@given(jobs(smallest=2), st.data())
@settings(max_examples=60)
def test_only_confirmed_copies_are_promoted(job: Job, data: st.DataObject) -> None:
    """Copies that are joining or catching up stay what they are, also when nobody else is left (rules 5.2, 6.5)."""
    demoted = []
    for group in job.plan.groups:
        roles = [data.draw(st.sampled_from(["replicas", "joining", "catch_up"])) for _ in group.replicas]
        by_role = {
            role: tuple(w for w, r in zip(group.replicas, roles, strict=True) if r == role) for role in set(roles)
        }
        demoted.append(
            Group(
                owner=group.owner,
                replicas=by_role.get("replicas", ()),
                joining=by_role.get("joining", ()),
                catch_up=by_role.get("catch_up", ()),
            )
        )
    gates = {ShardId(index): Epoch(1) for index, group in enumerate(demoted) if group.joining}
    plan = replace(job.plan, groups=tuple(demoted), gates=gates)
    lost = draw_lost(data, plan)
    check_loss(job.context, plan, plan_loss(job.context, plan, lost, Step(0), "lost"), lost)


def joiner(number: int, node: int) -> Member:
    """A worker that was never a member."""
    return Member(worker=WorkerId(number), node=NodeId(f"n{node}"), local_index=0, incarnation=1)


@given(jobs(smallest=2), st.data())
@settings(max_examples=100)
def test_a_joiner_hosts_the_neediest_stage_and_fetches_its_share(job: Job, data: st.DataObject) -> None:
    context = job.context
    plan = plan_loss(context, job.plan, draw_lost(data, job.plan), Step(0), "lost")
    member = joiner(100, data.draw(st.integers(0, 4)))
    joined = plan_join(context, plan, (member,), "joins")
    check_plan(context, joined.plan)
    assert joined.plan.tables == plan.tables
    own = {stage: sum(layers == stage.layers for layers in plan.hosting.values()) for stage in context.stages}
    stage = next(found for found in context.stages if own[found] == min(own.values()))
    assert joined.plan.hosting == {**plan.hosting, member.worker: stage.layers}
    for was, now in zip(plan.groups, joined.plan.groups, strict=True):
        assert (now.owner, now.replicas, now.joining) == (was.owner, was.replicas, was.joining)
        assert now.catch_up[: len(was.catch_up)] == was.catch_up
    shards = {shard for layer in stage.layers for shard in context.shape.shards_of_layer[layer]}
    taken = [shard for shard, worker in joined.swaps if worker == member.worker]
    assert len(taken) == len(joined.swaps)
    assert set(taken) <= shards
    assert all(member.worker in joined.plan.groups[shard].catch_up for shard in taken)
    hosts = sum(set(stage.layers) <= set(layers) for layers in joined.plan.hosting.values())
    sizes = {shard: context.shape.shards[shard].elements for shard in shards}
    fair, got = sum(sizes.values()) / hosts, sum(sizes[shard] for shard in taken)
    largest = max(sizes.values())
    assert got <= fair + largest / 2
    if all(plan.groups[shard].owner is not None for shard in shards):
        assert got >= fair - largest / 2


@given(jobs(smallest=2), st.data())
@settings(max_examples=60)
def test_new_routes_leave_earlier_steps_as_they_are(job: Job, data: st.DataObject) -> None:
    context = job.context
    plan, first, slowest = job.plan, Step(0), Step(0)
    for _ in range(data.draw(st.integers(1, 3))):
        slowest = Step(data.draw(st.integers(slowest, slowest + 3)))
        first = Step(slowest + data.draw(st.integers(1, 4)))
        new = plan_routes(context, plan, first, slowest, "even")
        check_plan(context, new)
        for step in map(Step, range(slowest, first)):
            assert new.table(step).routes == plan.table(step).routes
        for step in map(Step, range(first, first + 9)):
            assert all(hop.epoch == new.epoch for route in new.table(step).routes for hop in route)
        plan = new
    lost = draw_lost(data, plan)
    check_loss(context, plan, plan_loss(context, plan, lost, slowest, "lost"), lost, slowest)


@dataclass(slots=True, kw_only=True)
class Life:
    """A job to which things happen: members all are at `step` and have adopted all plans."""

    context: PlanningContext
    plan: Plan
    step: Step
    swaps: frozenset[tuple[ShardId, WorkerId]]
    gone: bool = False

    def reports(self, ready: Iterable[WorkerId]) -> Reports:
        """Copies are held by who gates decisions, and by `ready` as far as they fetch some."""
        at = dict.fromkeys(map(Epoch, range(1, self.plan.epoch + 1)), self.step)
        able = set(ready)
        held = {worker: dict[int, int]() for worker in self.plan.ids}
        for index, group in enumerate(self.plan.groups):
            for worker in (*group.gating, *(w for w in group.catch_up if w in able)):
                held[worker][index] = self.step
        return {
            worker: MemberReport(epoch=self.plan.epoch, step=self.step, adopted_at=at, versions=versions, reduced={})
            for worker, versions in held.items()
        }

    def settle(self, ready: Iterable[WorkerId]) -> None:
        """One plan that reports allow."""
        reports = self.reports(ready)
        answer = resolve_queries(self.context, self.plan, reports)
        self.gone = isinstance(answer, StateIsGone)
        if answer is None:
            answer = advance_copies(self.context, self.plan, reports, self.swaps)
        if isinstance(answer, Plan):
            self.move_copies(reports, answer)

    def move_copies(self, reports: Reports, new: Plan) -> None:
        for index, (was, now) in enumerate(zip(self.plan.groups, new.groups, strict=True)):
            if now.owner is not None and now.owner != was.owner:
                assert index in reports[now.owner].versions
            assert was.owner is None or set(now.confirmed) <= set(was.gating)
        self.plan = new


@given(jobs(smallest=2), st.data())
@settings(max_examples=100)
def test_any_sequence_of_losses_and_joins_keeps_all_that_must_hold(job: Job, data: st.DataObject) -> None:
    life = Life(context=job.context, plan=job.plan, step=Step(0), swaps=frozenset())
    for number in range(data.draw(st.integers(1, 8))):
        old = life.plan
        what = data.draw(st.sampled_from(["lose", "join", "settle", "settle", "route"]))
        if what == "lose" and len(old.ids) > 1:
            lost = draw_lost(data, old)
            life.plan = plan_loss(life.context, old, lost, life.step, "lost")
            check_loss(life.context, old, life.plan, lost, life.step)
        elif what == "join":
            members = tuple(joiner(100 + 2 * number + i, data.draw(st.integers(0, 4))) for i in range(1 + number % 2))
            joined = plan_join(life.context, old, members, "joins")
            life.plan, life.swaps = joined.plan, life.swaps | joined.swaps
        elif what == "settle":
            life.settle(data.draw(st.lists(st.sampled_from(sorted(old.ids)), unique=True)))
        elif what == "route" and not old.queries:
            life.plan = plan_routes(life.context, old, Step(life.step + 2), life.step, "even")
        assume(not life.gone)
        check_plan(life.context, life.plan)
        if not life.plan.queries:
            life.step = Step(life.step + data.draw(st.integers(0, 3)))
