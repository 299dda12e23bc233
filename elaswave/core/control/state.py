"""What the controller knows, and the primitives that all its reactions use."""

from dataclasses import dataclass, field

from elaswave.core.config import ControllerConfig
from elaswave.core.events import Effect, JobDescription, JobEnded, PersistPlan, SendPlans, StepReported
from elaswave.core.ids import Epoch, NodeId, ShardId, Step, WorkerId
from elaswave.core.incidents import OpenIncident
from elaswave.core.membership import WorkerRecord, WorkerState
from elaswave.core.plan import Plan
from elaswave.core.planner.context import MemberReport, PlanningContext
from elaswave.core.planner.reductions import with_reduce_plans
from elaswave.errors import InvariantError, ProtocolError

END_LIMIT_S = 10.0
"""Seconds that workers have to leave after the plan "finished"."""


@dataclass(slots=True, kw_only=True)
class PendingCheckpoint:
    """What is on disk of a checkpoint: manifests by shard, and whether the user's state is."""

    parts: dict[ShardId, str] = field(default_factory=dict)
    with_user_state: bool = False


class ControllerState:
    """Mutable state; every method may add to `effects`."""

    def __init__(self, config: ControllerConfig) -> None:
        self.config = config
        self.now = 0.0
        self.effects: list[Effect] = []
        self.ended = False
        self.workers: dict[WorkerId, WorkerRecord] = {}
        self.nodes: dict[NodeId, int] = {}
        self.next_worker = int(config.first_worker)
        self.restarts = config.restarts_used
        self.job: JobDescription | None = None
        self.fingerprint = ""
        self.context: PlanningContext | None = None
        self.plan: Plan | None = None
        self.reports: dict[WorkerId, MemberReport] = {}
        self.steps_of: dict[WorkerId, Step] = {}
        self.swaps: frozenset[tuple[ShardId, WorkerId]] = frozenset()
        self.joining: set[WorkerId] = set()
        self.uneven = False
        self.incidents: list[OpenIncident] = []
        self.early_steps: dict[Step, StepReported] = {}
        self.next_step = Step(0)
        self.last_step_at = 0.0
        self.step_seconds: list[float] = []
        self.broken_links: dict[WorkerId, tuple[float, str]] = {}
        self.digest = ""
        self.checkpoints: dict[Step, PendingCheckpoint] = {}
        self.committed = False
        self.start_limit: float | None = None
        self.start_notice: float | None = None
        self.end_limit: float | None = None
        self.no_epoch = Epoch(0)

    def worker(self, worker: WorkerId) -> WorkerRecord:
        """The record of a worker. Raises ProtocolError for an id that was never given."""
        record = self.workers.get(worker)
        if record is None:
            raise ProtocolError(
                f"an agent speaks of worker {worker}, which was never started (ids so far: {len(self.workers)})"
            )
        return record

    def alive(self) -> list[WorkerRecord]:
        """Workers not known to be dead."""
        return [record for record in self.workers.values() if record.state is not WorkerState.GONE]

    def need_plan(self) -> tuple[PlanningContext, Plan]:
        """The context and newest plan, for code that runs only after the start."""
        if self.context is None or self.plan is None:
            raise InvariantError("a plan is needed before the job has started")
        return self.context, self.plan

    def persist(self, plan: Plan) -> None:
        """Make `plan` the newest one: write it, then send it to all who are in it, were in it, or may come back.

        Reduce plans are added here, as all other changes make them necessary.
        """
        previous = self.plan
        if self.context is not None:
            plan = with_reduce_plans(self.context, previous, plan, self.fastest_step())
        self.plan = plan
        self.effects.append(PersistPlan(plan=plan, previous=previous))
        for record in self.workers.values():
            follows = record.admitted_once or record.worker in plan.ids
            if follows and record.state not in (WorkerState.GONE, WorkerState.FENCED):
                record.admitted_once = True
                self.effects.append(SendPlans(worker=record.worker, first_epoch=plan.epoch))

    def end(self, exit_code: int, message: str) -> None:
        """The job is over."""
        if not self.ended:
            self.ended = True
            self.effects.append(JobEnded(exit_code=exit_code, message=message, digest=self.digest))

    def slowest_step(self) -> Step:
        """No member is at a lower step."""
        _, plan = self.need_plan()
        return min((self.steps_of.get(worker, self.start_step()) for worker in plan.ids), default=self.start_step())

    def fastest_step(self) -> Step:
        """The highest step that anybody has reported."""
        return max(self.steps_of.values(), default=self.start_step())

    def start_step(self) -> Step:
        """Step that the job began or resumed at."""
        return self.job.start_step if self.job is not None else Step(0)

    def state_name(self) -> str:
        """For people."""
        if self.ended:
            return "ended"
        if self.plan is None:
            return "starting"
        if self.plan.finished:
            return "finishing"
        return "recovering" if self.incidents else "training"

    def next_deadline(self) -> float | None:
        """When a Tick is wanted at the latest."""
        links = (due for due, _ in self.broken_links.values())
        starts = (self.start_limit, self.start_notice)
        limits = [*links, *starts, self.end_limit, *(record.fence_at for record in self.workers.values())]
        return min((limit for limit in limits if limit is not None), default=None)
