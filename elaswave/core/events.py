"""What happens to a job, and what the controller wants done. Values only; times are CLOCK_MONOTONIC seconds."""

from dataclasses import dataclass, field

from elaswave.core.ids import Epoch, Layer, MicroBatch, NodeId, ShardId, Step, WorkerId
from elaswave.core.plan import Plan

# ------------------------------------------------------------------ what is told


@dataclass(frozen=True, slots=True, kw_only=True)
class ParameterDescription:
    """One parameter of a layer. `tie_group` above 0: one parameter shared by all layers that name this group."""

    name: str
    shape: tuple[int, ...]
    tie_group: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class JobDescription:
    """What the script asks for. `digest` covers everything that decides the bits; equal on all workers."""

    layers: tuple[tuple[ParameterDescription, ...], ...]
    steps: int
    micro_batches: int
    digest: str
    start_step: Step = Step(0)
    resume_from: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """A worker's progress page: masks are over micro-batches of `step`."""

    step: Step = Step(0)
    phase: str = ""
    instructions: int = 0
    forward_begun: int = 0
    forward_done: int = 0
    backward_begun: int = 0
    backward_done: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class AgentAttached:
    """An agent registered with `workers` devices."""

    node: NodeId
    workers: int


@dataclass(frozen=True, slots=True, kw_only=True)
class AgentLost:
    """The stream of an agent ended; `clean` when it had said that it leaves."""

    node: NodeId
    clean: bool
    evidence: str
    noticed_at: float


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerStarted:
    """The process exists."""

    worker: WorkerId
    pid: int


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerReady:
    """The script has called train(); links listen at `address`."""

    worker: WorkerId
    address: str
    job: JobDescription
    fingerprint: str


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerExited:
    """The process is gone: `signal` above 0 when it was killed, else `exit_code`."""

    worker: WorkerId
    exit_code: int
    signal: int
    noticed_at: float
    last_alive_at: float
    progress: Progress = field(default_factory=Progress)


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerSuspected:
    """The worker shows no progress or its process is stopped; reversible."""

    worker: WorkerId
    cause: str
    evidence: str
    noticed_at: float
    last_alive_at: float
    progress: Progress = field(default_factory=Progress)


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerCleared:
    """A suspected worker goes on."""

    worker: WorkerId
    evidence: str


@dataclass(frozen=True, slots=True, kw_only=True)
class HeldShard:
    """A copy of optimizer state: `version` updates applied, `reduced` gradients of later steps held."""

    shard: ShardId
    version: int
    reduced: tuple[Step, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerReport:
    """Protocol progress (rule 7.3). `adoptions` pairs each epoch adopted since the last report with the step then."""

    worker: WorkerId
    epoch: Epoch
    step: Step
    adoptions: tuple[tuple[Epoch, Step], ...] = ()
    held: tuple[HeldShard, ...] = ()
    finished: bool = False
    hosted_ready: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class StepResult:
    """A decided step as one worker saw it; the same values from all."""

    step: Step
    loss: float
    tokens: int
    samples: int
    grad_norm: float
    skipped: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class StepReported:
    """`worker` knows the result of a step."""

    worker: WorkerId
    result: StepResult
    received_at: float


@dataclass(frozen=True, slots=True, kw_only=True)
class RepairHop:
    """One hop that a plan moved here and that was run."""

    micro_batch: MicroBatch
    first_layer: Layer
    backward: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkDone:
    """`worker` has run all hops that plan `epoch` gave it in `step`."""

    worker: WorkerId
    epoch: Epoch
    step: Step
    hops: tuple[RepairHop, ...]
    bytes: int
    first_start: float
    last_end: float


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkBroken:
    """`worker` lost its link to `peer`; evidence only, the peer's agent is the authority."""

    worker: WorkerId
    peer: WorkerId
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerFailed:
    """The user's code, or ours, raised in `worker`. kind: "user", "non-finite", "config" or "bug"."""

    worker: WorkerId
    kind: str
    message: str
    traceback: str


@dataclass(frozen=True, slots=True, kw_only=True)
class FinalDigest:
    """sha256 over all parameters after the last step."""

    worker: WorkerId
    parameters: str


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointWritten:
    """`worker` has written these shards at version `step`; `manifest` is its part of the index, as text.

    with_user_state: it runs the user's callbacks, and has written their state before, if they have any.
    """

    worker: WorkerId
    step: Step
    shards: tuple[ShardId, ...]
    manifest: str
    with_user_state: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class UserLine:
    """A line of text from on_step or evaluate."""

    worker: WorkerId
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class StopRequested:
    """An operator or a signal asks the job to end now."""

    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Tick:
    """Time has passed; sent when the deadline that the controller named is due."""


Event = (
    AgentAttached | AgentLost | WorkerStarted | WorkerReady | WorkerExited | WorkerSuspected | WorkerCleared
    | WorkerReport | StepReported | WorkDone | LinkBroken | WorkerFailed | FinalDigest | CheckpointWritten
    | UserLine | StopRequested | Tick
)  # fmt: skip

# ------------------------------------------------------------------ what is to be done, in this order


@dataclass(frozen=True, slots=True, kw_only=True)
class StartWorker:
    """Start a process on `node`. `rank` and `world_size` are for the script's environment only."""

    node: NodeId
    worker: WorkerId
    local_index: int
    incarnation: int
    rank: int
    world_size: int
    restart_count: int


@dataclass(frozen=True, slots=True, kw_only=True)
class PersistPlan:
    """Write the plan by compare-and-set on its epoch, before any effect after this one."""

    plan: Plan
    previous: Plan | None


@dataclass(frozen=True, slots=True, kw_only=True)
class SendPlans:
    """Send the persisted plans from `first_epoch` to the newest to this worker, in order."""

    worker: WorkerId
    first_epoch: Epoch


@dataclass(frozen=True, slots=True, kw_only=True)
class FenceWorker:
    """Kill the process and confirm with WorkerExited."""

    worker: WorkerId
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class StepRecorded:
    """A step was decided: first report of it. `seconds` since the one before, for the first one since the
    first plan."""

    result: StepResult
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Incident:
    """One failure or planned change, from its cause to the end of its repair. Seconds; -1 where not known.

    detect: last sign of life to the agent noticing. plan: noticed to persisted. edit: persisted to adopted by all.
    repair: adopted to the last moved hop done. resume: last sign of life to the first moved hop begun elsewhere.
    delay: the step's time less the median.
    dead_hops: hops that the lost workers had begun or finished in the step; redone_hops: those of them run again;
    step_hops: all hops of the step. The first two count hops of one micro-batch and direction on one worker once.
    """

    epoch: Epoch
    cause: str
    evidence: str
    workers: tuple[WorkerId, ...]
    step: Step
    phase: str
    detect_s: float
    plan_s: float
    edit_s: float
    repair_s: float
    resume_s: float
    delay_s: float
    redone_hops: int
    dead_hops: int
    step_hops: int
    bytes_moved: int
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class IncidentClosed:
    """An incident is complete."""

    incident: Incident


@dataclass(frozen=True, slots=True, kw_only=True)
class CommitCheckpoint:
    """Every shard of `step` is on disk: write the index that makes the checkpoint valid."""

    step: Step
    manifests: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ShowLine:
    """Show a line to the operator."""

    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class RestartAll:
    """Every copy of some state is gone: end all workers and start again from the last durable checkpoint."""

    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class JobEnded:
    """The job is over: 0 done, 1 failed, 93 refused before the first step."""

    exit_code: int
    message: str
    digest: str = ""


Effect = (
    StartWorker | PersistPlan | SendPlans | FenceWorker | StepRecorded | IncidentClosed | CommitCheckpoint | ShowLine
    | RestartAll | JobEnded
)  # fmt: skip
