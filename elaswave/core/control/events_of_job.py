"""Progress of the job: reports, steps, incidents, durable checkpoints."""

from elaswave.core.control.lifecycle import LifecycleControl
from elaswave.core.control.state import PendingCheckpoint
from elaswave.core.events import (
    CheckpointWritten,
    CommitCheckpoint,
    IncidentClosed,
    StepRecorded,
    StepReported,
    WorkDone,
    WorkerReport,
)
from elaswave.core.ids import Epoch, Step
from elaswave.core.incidents import OpenIncident, usual_step
from elaswave.core.planner.context import MemberReport


class JobEvents(LifecycleControl):
    """What workers tell about their work."""

    def worker_report(self, event: WorkerReport) -> None:
        """Merge a monotone report (rule 7.3) and do what it allows."""
        before = self.reports.get(event.worker)
        adopted = self._adoptions_that_matter(before)
        adopted.update(event.adoptions)
        self.reports[event.worker] = MemberReport(
            epoch=event.epoch,
            step=event.step,
            adopted_at=adopted,
            versions={held.shard: held.version for held in event.held},
            reduced={held.shard: held.reduced for held in event.held},
            hosted_ready=event.hosted_ready,
            finished=event.finished,
        )
        self._reached(event.worker, event.step)
        if self.plan is not None:
            for incident in self.incidents:
                if event.epoch >= incident.epoch:
                    incident.adopted_by(event.worker, self.now, self.plan)
            self.advance()
        self._close_incidents()

    def _adoptions_that_matter(self, before: MemberReport | None) -> dict[Epoch, Step]:
        """Only plans that make copies gate are asked for later; the rest would grow for ever."""
        if before is None or self.plan is None:
            return {}
        oldest = min(self.plan.gates.values(), default=self.plan.epoch)
        return {epoch: step for epoch, step in before.adopted_at.items() if epoch >= oldest}

    def _reached(self, worker: int, step: Step) -> None:
        if self.plan is not None and worker in self.plan.ids:
            known = self.workers[worker].worker  # type: ignore[index]
            self.steps_of[known] = max(step, self.steps_of.get(known, Step(0)))

    def step_reported(self, event: StepReported) -> None:
        """The first report of a step counts; all carry the same values."""
        before = self.next_step
        self._reached(event.worker, Step(event.result.step + 1))
        if event.result.step >= self.next_step:
            self.early_steps.setdefault(event.result.step, event)
        # Who jumped over a step reports a later one before others have reported the one in between.
        while (first := self.early_steps.pop(self.next_step, None)) is not None:
            seconds = max(0.0, first.received_at - self.last_step_at) if self.last_step_at else 0.0
            self.last_step_at = first.received_at
            self.next_step = Step(self.next_step + 1)
            self.step_seconds.append(seconds)
            self.effects.append(StepRecorded(result=first.result, seconds=seconds))
        if self.next_step == before:
            return
        if self.plan is not None and len(self.plan.ids) < self.config.layout_workers:
            self.advance()  # a suspect that was ahead of everybody may come back now
        self._close_incidents()

    # ------------------------------------------------------------------ incidents

    def work_done(self, event: WorkDone) -> None:
        """A worker has run the hops that a plan moved to it."""
        for incident in self.incidents:
            if incident.epoch == event.epoch:
                incident.work_done(event, self.now)
        self._close_incidents()

    def _close_incidents(self) -> None:
        """An incident ends when all have adopted its plan and the step it fell into is decided."""
        still: list[OpenIncident] = []
        for incident in self.incidents:
            over = incident.step < self.next_step and incident.edited_at is not None
            if over or (self.plan is not None and self.plan.finished):
                self.effects.append(self._closed(incident))
            else:
                still.append(incident)
        self.incidents = still

    def close_all_incidents(self) -> list[IncidentClosed]:
        """The job is over: what is known of the incidents under way."""
        closed = [self._closed(incident) for incident in self.incidents]
        self.incidents = []
        return closed

    def _closed(self, incident: OpenIncident) -> IncidentClosed:
        index = incident.step - self.start_step()
        seconds = self.step_seconds[index] if 0 <= index < len(self.step_seconds) else 0.0
        usual = usual_step(self.step_seconds[:index]) or seconds
        return IncidentClosed(incident=incident.close(seconds, usual))

    # ------------------------------------------------------------------ durable checkpoints

    def checkpoint_written(self, event: CheckpointWritten) -> None:
        """Commit a checkpoint when all of its step is on disk, the user's state too; older incomplete ones are void."""
        context, _ = self.need_plan()
        found = self.checkpoints.setdefault(event.step, PendingCheckpoint())
        found.with_user_state = found.with_user_state or event.with_user_state
        for shard in event.shards:
            found.parts[shard] = event.manifest
        if found.with_user_state and len(found.parts) == len(context.shape.shards):
            manifests = tuple(dict.fromkeys(found.parts[shard] for shard in sorted(found.parts)))
            self.effects.append(CommitCheckpoint(step=event.step, manifests=manifests))
            self.committed = True
            self.checkpoints = {step: later for step, later in self.checkpoints.items() if step > event.step}
