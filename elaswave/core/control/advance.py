"""What follows from reports without a new failure: copies, joins, even routes, the end (rules 5.3, 6, 7.4, 4.11)."""

from collections.abc import Iterable

from elaswave.core.control.state import END_LIMIT_S, ControllerState
from elaswave.core.events import RestartAll
from elaswave.core.ids import ShardId, Step, WorkerId
from elaswave.core.incidents import OpenIncident, hops_of_step
from elaswave.core.membership import Trigger, WorkerRecord, WorkerState
from elaswave.core.plan import Plan
from elaswave.core.planner.context import supersede
from elaswave.core.planner.copies import StateIsGone, advance_copies, resolve_queries
from elaswave.core.planner.join import may_bring, may_return, plan_join, plan_routes

JOIN = "join"
"""Cause of incidents in which workers come, not go."""

ROUTE_LEAD_STEPS = 2
"""Announced routes begin this many steps ahead of the highest reported one; late is legal but costs work."""


class AdvanceControl(ControllerState):
    """Planned changes, one plan at a time, each from the newest persisted one."""

    def advance(self) -> None:
        """Make the next plan that the reports allow, if any."""
        while self.plan is not None and not self.plan.finished and not self.ended:
            if not (self._finish() or self._find_owners() or self._move_copies() or self._admit() or self._route()):
                return

    def _finish(self) -> bool:
        _, plan = self.need_plan()
        reports = [self.reports.get(worker) for worker in plan.ids]
        done = all(report is not None and report.finished and report.epoch == plan.epoch for report in reports)
        if not done or (self.config.want_report and not self.digest):
            return False
        self.persist(supersede(plan, "finished: all members are at the last version", finished=True))
        self.end_limit = self.now + END_LIMIT_S
        return True

    def _find_owners(self) -> bool:
        context, plan = self.need_plan()
        answer = resolve_queries(context, plan, self.reports)
        if isinstance(answer, StateIsGone):
            return self._fall_back(answer)
        if answer is not None:
            self.persist(answer)
        return answer is not None

    def _fall_back(self, gone: StateIsGone) -> bool:
        """End the job, or this generation of it; False while a suspect may still bring a copy."""
        if any(self._may_bring(record, gone.shards) for record in self.workers.values()):
            return False
        self.go_back(f"owner and all replicas of {len(gone.shards)} shards are lost", ", or more --replicas")
        return True

    def go_back(self, why: str, other_remedy: str = "") -> None:
        """To the last durable checkpoint, with all workers; the end of the job where there is none."""
        if self.committed or (self.job is not None and self.job.resume_from):
            self.effects.append(RestartAll(reason=f"{why}: going back to the last durable checkpoint"))
            self.ended = True
        else:
            remedy = f"use --save-every and --save-dir{other_remedy}"
            self.end(1, f"{why} and there is no durable checkpoint: {remedy}")

    def _move_copies(self) -> bool:
        context, plan = self.need_plan()
        made = advance_copies(context, plan, self.reports, self.swaps)
        if made is None:
            return False
        self.swaps = frozenset(
            (shard, worker)
            for shard, worker in self.swaps
            if worker in made.groups[shard].everyone and made.groups[shard].owner != worker
        )
        self.persist(made)
        return True

    def _may_bring(self, record: WorkerRecord, shards: Iterable[ShardId]) -> bool:
        """A suspect holds, or may hold, the only copy: it is back or fenced before long (rule 5.3)."""
        _, plan = self.need_plan()
        outside = record.admitted_once and record.worker not in plan.ids
        alive = record.state in (WorkerState.SUSPECTED, WorkerState.WARM)
        return outside and alive and may_bring(plan, self.reports, record.worker, shards, self.fastest_step())

    def _candidates(self) -> list[WorkerRecord]:
        """Warm workers that may come in now, as many as are missing; where copies are sought, whoever may bring one."""
        _, plan = self.need_plan()
        fastest = self.fastest_step()
        warm = [record for record in self.workers.values() if record.state is WorkerState.WARM]
        back = [r for r in warm if r.admitted_once and may_return(plan, self.reports, r.worker, fastest)]
        if plan.queries:
            return [record for record in back if self._may_bring(record, plan.queries)]
        missing = self.config.layout_workers - len(plan.ids)
        return [record for record in warm if not record.admitted_once or record in back][: max(0, missing)]

    def _admit(self) -> bool:
        """Warm workers take the place of lost ones; suspects that were alive come back."""
        context, plan = self.need_plan()
        joiners = self._candidates()
        if not joiners:
            return False
        names = ", ".join(record.name for record in joiners)
        joined = plan_join(context, plan, tuple(record.member() for record in joiners), f"{names} joins")
        for record in joiners:
            record.move(Trigger.ADMITTED)
            self.joining.add(record.worker)
            self.reports.pop(record.worker, None)
        self.swaps |= joined.swaps
        self.persist(joined.plan)
        ids = tuple(record.worker for record in joiners)
        self.open_incident(JOIN, f"{names} warm", ids, noticed_at=self.now, last_alive_at=0.0, plan=joined.plan)
        return True

    def _route(self) -> bool:
        """Deal the work evenly: to joiners that hold their parameters, and after a loss from a later step on."""
        context, plan = self.need_plan()
        for worker in list(self.joining):
            report = self.reports.get(worker)
            if worker not in plan.ids:
                self.joining.discard(worker)
            elif report is not None and report.hosted_ready and report.epoch == plan.epoch:
                self.joining.discard(worker)
                self.uneven = True
        if not self.uneven or self.joining or plan.queries:
            return False
        first_step = Step(self.fastest_step() + ROUTE_LEAD_STEPS)
        self.uneven = False
        if self.job is None or first_step >= self.job.steps:
            return False
        reason = f"work dealt evenly over {len(plan.ids)} workers from step {first_step} on"
        self.persist(plan_routes(context, plan, first_step, self.slowest_step(), reason))
        return True

    def open_incident(
        self,
        cause: str,
        evidence: str,
        workers: tuple[WorkerId, ...],
        *,
        noticed_at: float,
        last_alive_at: float,
        plan: Plan,
    ) -> OpenIncident:
        """Begin the record of an incident whose plan has just been persisted."""
        step = self.next_step
        # Nobody's work is lost when somebody joins; what a joiner did before it was excluded is another incident.
        progress = () if cause == JOIN else tuple(self.workers[worker].progress for worker in workers)
        lost_in_step = [found for found in progress if found.phase]
        if lost_in_step:
            step = lost_in_step[0].step
        incident = OpenIncident(
            epoch=plan.epoch,
            cause=cause,
            evidence=evidence,
            workers=workers,
            step=step,
            phase=lost_in_step[0].phase if lost_in_step else "",
            last_alive_at=last_alive_at,
            noticed_at=noticed_at,
            planned_at=self.now,
            reason=plan.reason,
            step_hops=hops_of_step(plan, step),
            lost_progress=progress,
        )
        self.incidents.append(incident)
        return incident
