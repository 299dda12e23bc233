"""Book-keeping of incidents: from a plan's cause to the end of its repair."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median

from elaswave.core.events import Incident, Progress, WorkDone
from elaswave.core.ids import Epoch, MicroBatch, Step, WorkerId
from elaswave.core.plan import Plan

_RECENT_STEPS = 50  # enough for a steady median, short enough to follow a changed layout


@dataclass(slots=True, kw_only=True)
class OpenIncident:
    """An incident whose end is not known yet. Times are CLOCK_MONOTONIC seconds."""

    epoch: Epoch
    cause: str
    evidence: str
    workers: tuple[WorkerId, ...]
    step: Step
    phase: str
    last_alive_at: float
    noticed_at: float
    planned_at: float
    reason: str
    step_hops: int
    lost_progress: tuple[Progress, ...]
    adopted: dict[WorkerId, float] = field(default_factory=dict)
    edited_at: float | None = None
    repaired_at: float | None = None
    resumed_at: float | None = None
    redone: set[tuple[int, MicroBatch, bool]] = field(default_factory=set)
    bytes_moved: int = 0

    def adopted_by(self, worker: WorkerId, now: float, plan: Plan) -> None:
        """A member has taken over the plan of this incident, or a later one."""
        self.adopted.setdefault(worker, now)
        if self.edited_at is None and all(member in self.adopted for member in plan.ids):
            self.edited_at = max(self.adopted[member] for member in plan.ids)

    def work_done(self, done: WorkDone, now: float) -> None:
        """A worker has run what this incident's plan gave it."""
        self.repaired_at = max(self.repaired_at or 0.0, now)
        if done.hops:
            self.resumed_at = min(self.resumed_at or done.first_start, done.first_start)
        self.bytes_moved += done.bytes
        for hop in done.hops:
            for index, progress in enumerate(self.lost_progress):
                begun = progress.backward_begun if hop.backward else progress.forward_begun
                if progress.step == done.step and begun >> hop.micro_batch & 1:
                    self.redone.add((index, hop.micro_batch, hop.backward))

    def close(self, seconds: float, usual: float) -> Incident:
        """The finished record; `seconds` of the step it fell into, `usual` the median step."""
        dead_hops = sum(
            (progress.forward_begun.bit_count() + progress.backward_begun.bit_count())
            for progress in self.lost_progress
            if progress.step == self.step
        )
        edited = self.edited_at
        return Incident(
            epoch=self.epoch,
            cause=self.cause,
            evidence=self.evidence,
            workers=self.workers,
            step=self.step,
            phase=self.phase,
            detect_s=self.noticed_at - self.last_alive_at if self.last_alive_at > 0 else -1.0,
            plan_s=self.planned_at - self.noticed_at,
            edit_s=edited - self.planned_at if edited is not None else -1.0,
            repair_s=max(0.0, self.repaired_at - edited) if edited is not None and self.repaired_at else 0.0,
            resume_s=self.resumed_at - self.last_alive_at if self.resumed_at and self.last_alive_at > 0 else -1.0,
            delay_s=seconds - usual,
            redone_hops=len(self.redone),
            dead_hops=dead_hops,
            step_hops=self.step_hops,
            bytes_moved=self.bytes_moved,
            reason=self.reason,
        )


def usual_step(seconds: Sequence[float]) -> float:
    """Median of the recent steps, 0 while there are none."""
    recent = seconds[-_RECENT_STEPS:]
    return median(recent) if recent else 0.0


def hops_of_step(plan: Plan, step: Step) -> int:
    """Forward and backward hops of one step."""
    return 2 * sum(len(route) for route in plan.table(step).routes)
