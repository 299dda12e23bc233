from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from typing import ClassVar as _ClassVar, Iterable as _Iterable, Mapping as _Mapping, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Member(_message.Message):
    __slots__ = ("worker", "node", "local_index", "incarnation", "address")
    WORKER_FIELD_NUMBER: _ClassVar[int]
    NODE_FIELD_NUMBER: _ClassVar[int]
    LOCAL_INDEX_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    worker: int
    node: str
    local_index: int
    incarnation: int
    address: str
    def __init__(self, worker: _Optional[int] = ..., node: _Optional[str] = ..., local_index: _Optional[int] = ..., incarnation: _Optional[int] = ..., address: _Optional[str] = ...) -> None: ...

class Hosting(_message.Message):
    __slots__ = ("worker", "layers")
    WORKER_FIELD_NUMBER: _ClassVar[int]
    LAYERS_FIELD_NUMBER: _ClassVar[int]
    worker: int
    layers: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, worker: _Optional[int] = ..., layers: _Optional[_Iterable[int]] = ...) -> None: ...

class Hop(_message.Message):
    __slots__ = ("worker", "epoch", "first", "last")
    WORKER_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    FIRST_FIELD_NUMBER: _ClassVar[int]
    LAST_FIELD_NUMBER: _ClassVar[int]
    worker: int
    epoch: int
    first: int
    last: int
    def __init__(self, worker: _Optional[int] = ..., epoch: _Optional[int] = ..., first: _Optional[int] = ..., last: _Optional[int] = ...) -> None: ...

class Route(_message.Message):
    __slots__ = ("micro_batch", "hops")
    MICRO_BATCH_FIELD_NUMBER: _ClassVar[int]
    HOPS_FIELD_NUMBER: _ClassVar[int]
    micro_batch: int
    hops: _containers.RepeatedCompositeFieldContainer[Hop]
    def __init__(self, micro_batch: _Optional[int] = ..., hops: _Optional[_Iterable[_Union[Hop, _Mapping]]] = ...) -> None: ...

class RouteTable(_message.Message):
    __slots__ = ("first_step", "routes")
    FIRST_STEP_FIELD_NUMBER: _ClassVar[int]
    ROUTES_FIELD_NUMBER: _ClassVar[int]
    first_step: int
    routes: _containers.RepeatedCompositeFieldContainer[Route]
    def __init__(self, first_step: _Optional[int] = ..., routes: _Optional[_Iterable[_Union[Route, _Mapping]]] = ...) -> None: ...

class Group(_message.Message):
    __slots__ = ("shard", "owner", "replicas", "joining", "catch_up")
    SHARD_FIELD_NUMBER: _ClassVar[int]
    OWNER_FIELD_NUMBER: _ClassVar[int]
    REPLICAS_FIELD_NUMBER: _ClassVar[int]
    JOINING_FIELD_NUMBER: _ClassVar[int]
    CATCH_UP_FIELD_NUMBER: _ClassVar[int]
    shard: int
    owner: int
    replicas: _containers.RepeatedScalarFieldContainer[int]
    joining: _containers.RepeatedScalarFieldContainer[int]
    catch_up: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, shard: _Optional[int] = ..., owner: _Optional[int] = ..., replicas: _Optional[_Iterable[int]] = ..., joining: _Optional[_Iterable[int]] = ..., catch_up: _Optional[_Iterable[int]] = ...) -> None: ...

class ShardEpoch(_message.Message):
    __slots__ = ("shard", "epoch")
    SHARD_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    shard: int
    epoch: int
    def __init__(self, shard: _Optional[int] = ..., epoch: _Optional[int] = ...) -> None: ...

class ReducePlan(_message.Message):
    __slots__ = ("layer", "kind", "order", "epoch", "first_step")
    LAYER_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    ORDER_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    FIRST_STEP_FIELD_NUMBER: _ClassVar[int]
    layer: int
    kind: str
    order: _containers.RepeatedScalarFieldContainer[int]
    epoch: int
    first_step: int
    def __init__(self, layer: _Optional[int] = ..., kind: _Optional[str] = ..., order: _Optional[_Iterable[int]] = ..., epoch: _Optional[int] = ..., first_step: _Optional[int] = ...) -> None: ...

class PlanDelta(_message.Message):
    __slots__ = ("epoch", "reason", "members_added", "members_removed", "hosting", "first_steps", "tables", "groups", "queries", "gates", "finished", "reduce_plans", "callers")
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    MEMBERS_ADDED_FIELD_NUMBER: _ClassVar[int]
    MEMBERS_REMOVED_FIELD_NUMBER: _ClassVar[int]
    HOSTING_FIELD_NUMBER: _ClassVar[int]
    FIRST_STEPS_FIELD_NUMBER: _ClassVar[int]
    TABLES_FIELD_NUMBER: _ClassVar[int]
    GROUPS_FIELD_NUMBER: _ClassVar[int]
    QUERIES_FIELD_NUMBER: _ClassVar[int]
    GATES_FIELD_NUMBER: _ClassVar[int]
    FINISHED_FIELD_NUMBER: _ClassVar[int]
    REDUCE_PLANS_FIELD_NUMBER: _ClassVar[int]
    CALLERS_FIELD_NUMBER: _ClassVar[int]
    epoch: int
    reason: str
    members_added: _containers.RepeatedCompositeFieldContainer[Member]
    members_removed: _containers.RepeatedScalarFieldContainer[int]
    hosting: _containers.RepeatedCompositeFieldContainer[Hosting]
    first_steps: _containers.RepeatedScalarFieldContainer[int]
    tables: _containers.RepeatedCompositeFieldContainer[RouteTable]
    groups: _containers.RepeatedCompositeFieldContainer[Group]
    queries: _containers.RepeatedCompositeFieldContainer[ShardEpoch]
    gates: _containers.RepeatedCompositeFieldContainer[ShardEpoch]
    finished: bool
    reduce_plans: _containers.RepeatedCompositeFieldContainer[ReducePlan]
    callers: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, epoch: _Optional[int] = ..., reason: _Optional[str] = ..., members_added: _Optional[_Iterable[_Union[Member, _Mapping]]] = ..., members_removed: _Optional[_Iterable[int]] = ..., hosting: _Optional[_Iterable[_Union[Hosting, _Mapping]]] = ..., first_steps: _Optional[_Iterable[int]] = ..., tables: _Optional[_Iterable[_Union[RouteTable, _Mapping]]] = ..., groups: _Optional[_Iterable[_Union[Group, _Mapping]]] = ..., queries: _Optional[_Iterable[_Union[ShardEpoch, _Mapping]]] = ..., gates: _Optional[_Iterable[_Union[ShardEpoch, _Mapping]]] = ..., finished: bool = ..., reduce_plans: _Optional[_Iterable[_Union[ReducePlan, _Mapping]]] = ..., callers: _Optional[_Iterable[int]] = ...) -> None: ...

class Parameter(_message.Message):
    __slots__ = ("name", "shape", "tie_group")
    NAME_FIELD_NUMBER: _ClassVar[int]
    SHAPE_FIELD_NUMBER: _ClassVar[int]
    TIE_GROUP_FIELD_NUMBER: _ClassVar[int]
    name: str
    shape: _containers.RepeatedScalarFieldContainer[int]
    tie_group: int
    def __init__(self, name: _Optional[str] = ..., shape: _Optional[_Iterable[int]] = ..., tie_group: _Optional[int] = ...) -> None: ...

class LayerDescription(_message.Message):
    __slots__ = ("parameters",)
    PARAMETERS_FIELD_NUMBER: _ClassVar[int]
    parameters: _containers.RepeatedCompositeFieldContainer[Parameter]
    def __init__(self, parameters: _Optional[_Iterable[_Union[Parameter, _Mapping]]] = ...) -> None: ...

class JobDescription(_message.Message):
    __slots__ = ("layers", "steps", "micro_batches", "digest", "start_step", "resume_from")
    LAYERS_FIELD_NUMBER: _ClassVar[int]
    STEPS_FIELD_NUMBER: _ClassVar[int]
    MICRO_BATCHES_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    START_STEP_FIELD_NUMBER: _ClassVar[int]
    RESUME_FROM_FIELD_NUMBER: _ClassVar[int]
    layers: _containers.RepeatedCompositeFieldContainer[LayerDescription]
    steps: int
    micro_batches: int
    digest: str
    start_step: int
    resume_from: str
    def __init__(self, layers: _Optional[_Iterable[_Union[LayerDescription, _Mapping]]] = ..., steps: _Optional[int] = ..., micro_batches: _Optional[int] = ..., digest: _Optional[str] = ..., start_step: _Optional[int] = ..., resume_from: _Optional[str] = ...) -> None: ...

class WorkerReady(_message.Message):
    __slots__ = ("address", "job", "fingerprint")
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    JOB_FIELD_NUMBER: _ClassVar[int]
    FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    address: str
    job: JobDescription
    fingerprint: str
    def __init__(self, address: _Optional[str] = ..., job: _Optional[_Union[JobDescription, _Mapping]] = ..., fingerprint: _Optional[str] = ...) -> None: ...

class HeldShard(_message.Message):
    __slots__ = ("shard", "version", "reduced")
    SHARD_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    REDUCED_FIELD_NUMBER: _ClassVar[int]
    shard: int
    version: int
    reduced: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, shard: _Optional[int] = ..., version: _Optional[int] = ..., reduced: _Optional[_Iterable[int]] = ...) -> None: ...

class WorkerReport(_message.Message):
    __slots__ = ("epoch", "step", "adoptions", "held", "finished", "hosted_ready")
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    ADOPTIONS_FIELD_NUMBER: _ClassVar[int]
    HELD_FIELD_NUMBER: _ClassVar[int]
    FINISHED_FIELD_NUMBER: _ClassVar[int]
    HOSTED_READY_FIELD_NUMBER: _ClassVar[int]
    epoch: int
    step: int
    adoptions: _containers.RepeatedCompositeFieldContainer[Adoption]
    held: _containers.RepeatedCompositeFieldContainer[HeldShard]
    finished: bool
    hosted_ready: bool
    def __init__(self, epoch: _Optional[int] = ..., step: _Optional[int] = ..., adoptions: _Optional[_Iterable[_Union[Adoption, _Mapping]]] = ..., held: _Optional[_Iterable[_Union[HeldShard, _Mapping]]] = ..., finished: bool = ..., hosted_ready: bool = ...) -> None: ...

class Adoption(_message.Message):
    __slots__ = ("epoch", "step")
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    epoch: int
    step: int
    def __init__(self, epoch: _Optional[int] = ..., step: _Optional[int] = ...) -> None: ...

class StepResult(_message.Message):
    __slots__ = ("step", "loss", "tokens", "samples", "grad_norm", "skipped")
    STEP_FIELD_NUMBER: _ClassVar[int]
    LOSS_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    SAMPLES_FIELD_NUMBER: _ClassVar[int]
    GRAD_NORM_FIELD_NUMBER: _ClassVar[int]
    SKIPPED_FIELD_NUMBER: _ClassVar[int]
    step: int
    loss: float
    tokens: int
    samples: int
    grad_norm: float
    skipped: bool
    def __init__(self, step: _Optional[int] = ..., loss: _Optional[float] = ..., tokens: _Optional[int] = ..., samples: _Optional[int] = ..., grad_norm: _Optional[float] = ..., skipped: bool = ...) -> None: ...

class WorkDone(_message.Message):
    __slots__ = ("epoch", "step", "hops", "bytes", "first_start", "last_end")
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    HOPS_FIELD_NUMBER: _ClassVar[int]
    BYTES_FIELD_NUMBER: _ClassVar[int]
    FIRST_START_FIELD_NUMBER: _ClassVar[int]
    LAST_END_FIELD_NUMBER: _ClassVar[int]
    epoch: int
    step: int
    hops: _containers.RepeatedCompositeFieldContainer[RepairHop]
    bytes: int
    first_start: float
    last_end: float
    def __init__(self, epoch: _Optional[int] = ..., step: _Optional[int] = ..., hops: _Optional[_Iterable[_Union[RepairHop, _Mapping]]] = ..., bytes: _Optional[int] = ..., first_start: _Optional[float] = ..., last_end: _Optional[float] = ...) -> None: ...

class RepairHop(_message.Message):
    __slots__ = ("micro_batch", "first_layer", "backward")
    MICRO_BATCH_FIELD_NUMBER: _ClassVar[int]
    FIRST_LAYER_FIELD_NUMBER: _ClassVar[int]
    BACKWARD_FIELD_NUMBER: _ClassVar[int]
    micro_batch: int
    first_layer: int
    backward: bool
    def __init__(self, micro_batch: _Optional[int] = ..., first_layer: _Optional[int] = ..., backward: bool = ...) -> None: ...

class LinkBroken(_message.Message):
    __slots__ = ("peer", "reason")
    PEER_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    peer: int
    reason: str
    def __init__(self, peer: _Optional[int] = ..., reason: _Optional[str] = ...) -> None: ...

class WorkerFailed(_message.Message):
    __slots__ = ("kind", "message", "traceback")
    KIND_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    TRACEBACK_FIELD_NUMBER: _ClassVar[int]
    kind: str
    message: str
    traceback: str
    def __init__(self, kind: _Optional[str] = ..., message: _Optional[str] = ..., traceback: _Optional[str] = ...) -> None: ...

class FinalDigest(_message.Message):
    __slots__ = ("parameters",)
    PARAMETERS_FIELD_NUMBER: _ClassVar[int]
    parameters: str
    def __init__(self, parameters: _Optional[str] = ...) -> None: ...

class CheckpointShard(_message.Message):
    __slots__ = ("step", "manifest", "shards", "with_user_state")
    STEP_FIELD_NUMBER: _ClassVar[int]
    MANIFEST_FIELD_NUMBER: _ClassVar[int]
    SHARDS_FIELD_NUMBER: _ClassVar[int]
    WITH_USER_STATE_FIELD_NUMBER: _ClassVar[int]
    step: int
    manifest: str
    shards: _containers.RepeatedScalarFieldContainer[int]
    with_user_state: bool
    def __init__(self, step: _Optional[int] = ..., manifest: _Optional[str] = ..., shards: _Optional[_Iterable[int]] = ..., with_user_state: bool = ...) -> None: ...

class WorkerMessage(_message.Message):
    __slots__ = ("ready", "report", "step_result", "work_done", "link_broken", "failed", "digest", "checkpoint", "line")
    READY_FIELD_NUMBER: _ClassVar[int]
    REPORT_FIELD_NUMBER: _ClassVar[int]
    STEP_RESULT_FIELD_NUMBER: _ClassVar[int]
    WORK_DONE_FIELD_NUMBER: _ClassVar[int]
    LINK_BROKEN_FIELD_NUMBER: _ClassVar[int]
    FAILED_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    CHECKPOINT_FIELD_NUMBER: _ClassVar[int]
    LINE_FIELD_NUMBER: _ClassVar[int]
    ready: WorkerReady
    report: WorkerReport
    step_result: StepResult
    work_done: WorkDone
    link_broken: LinkBroken
    failed: WorkerFailed
    digest: FinalDigest
    checkpoint: CheckpointShard
    line: UserLine
    def __init__(self, ready: _Optional[_Union[WorkerReady, _Mapping]] = ..., report: _Optional[_Union[WorkerReport, _Mapping]] = ..., step_result: _Optional[_Union[StepResult, _Mapping]] = ..., work_done: _Optional[_Union[WorkDone, _Mapping]] = ..., link_broken: _Optional[_Union[LinkBroken, _Mapping]] = ..., failed: _Optional[_Union[WorkerFailed, _Mapping]] = ..., digest: _Optional[_Union[FinalDigest, _Mapping]] = ..., checkpoint: _Optional[_Union[CheckpointShard, _Mapping]] = ..., line: _Optional[_Union[UserLine, _Mapping]] = ...) -> None: ...

class UserLine(_message.Message):
    __slots__ = ("text",)
    TEXT_FIELD_NUMBER: _ClassVar[int]
    text: str
    def __init__(self, text: _Optional[str] = ...) -> None: ...

class Injection(_message.Message):
    __slots__ = ("action", "worker", "step", "phase", "factor", "during_recovery")
    ACTION_FIELD_NUMBER: _ClassVar[int]
    WORKER_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    PHASE_FIELD_NUMBER: _ClassVar[int]
    FACTOR_FIELD_NUMBER: _ClassVar[int]
    DURING_RECOVERY_FIELD_NUMBER: _ClassVar[int]
    action: str
    worker: int
    step: int
    phase: str
    factor: float
    during_recovery: bool
    def __init__(self, action: _Optional[str] = ..., worker: _Optional[int] = ..., step: _Optional[int] = ..., phase: _Optional[str] = ..., factor: _Optional[float] = ..., during_recovery: bool = ...) -> None: ...

class AgentMessage(_message.Message):
    __slots__ = ("plan", "injection", "stop", "settings")
    PLAN_FIELD_NUMBER: _ClassVar[int]
    INJECTION_FIELD_NUMBER: _ClassVar[int]
    STOP_FIELD_NUMBER: _ClassVar[int]
    SETTINGS_FIELD_NUMBER: _ClassVar[int]
    plan: PlanDelta
    injection: Injection
    stop: Stop
    settings: Settings
    def __init__(self, plan: _Optional[_Union[PlanDelta, _Mapping]] = ..., injection: _Optional[_Union[Injection, _Mapping]] = ..., stop: _Optional[_Union[Stop, _Mapping]] = ..., settings: _Optional[_Union[Settings, _Mapping]] = ...) -> None: ...

class Settings(_message.Message):
    __slots__ = ("token", "run_dir", "save_dir", "save_every", "unbuffered", "log_cap_bytes", "worker", "node", "want_digest", "link_transport", "link_host", "resume_from", "shard_elements")
    TOKEN_FIELD_NUMBER: _ClassVar[int]
    RUN_DIR_FIELD_NUMBER: _ClassVar[int]
    SAVE_DIR_FIELD_NUMBER: _ClassVar[int]
    SAVE_EVERY_FIELD_NUMBER: _ClassVar[int]
    UNBUFFERED_FIELD_NUMBER: _ClassVar[int]
    LOG_CAP_BYTES_FIELD_NUMBER: _ClassVar[int]
    WORKER_FIELD_NUMBER: _ClassVar[int]
    NODE_FIELD_NUMBER: _ClassVar[int]
    WANT_DIGEST_FIELD_NUMBER: _ClassVar[int]
    LINK_TRANSPORT_FIELD_NUMBER: _ClassVar[int]
    LINK_HOST_FIELD_NUMBER: _ClassVar[int]
    RESUME_FROM_FIELD_NUMBER: _ClassVar[int]
    SHARD_ELEMENTS_FIELD_NUMBER: _ClassVar[int]
    token: str
    run_dir: str
    save_dir: str
    save_every: int
    unbuffered: bool
    log_cap_bytes: int
    worker: int
    node: str
    want_digest: bool
    link_transport: str
    link_host: str
    resume_from: str
    shard_elements: int
    def __init__(self, token: _Optional[str] = ..., run_dir: _Optional[str] = ..., save_dir: _Optional[str] = ..., save_every: _Optional[int] = ..., unbuffered: bool = ..., log_cap_bytes: _Optional[int] = ..., worker: _Optional[int] = ..., node: _Optional[str] = ..., want_digest: bool = ..., link_transport: _Optional[str] = ..., link_host: _Optional[str] = ..., resume_from: _Optional[str] = ..., shard_elements: _Optional[int] = ...) -> None: ...

class Stop(_message.Message):
    __slots__ = ("reason",)
    REASON_FIELD_NUMBER: _ClassVar[int]
    reason: str
    def __init__(self, reason: _Optional[str] = ...) -> None: ...

class AgentHello(_message.Message):
    __slots__ = ("node", "workers", "pid", "host", "link_host")
    NODE_FIELD_NUMBER: _ClassVar[int]
    WORKERS_FIELD_NUMBER: _ClassVar[int]
    PID_FIELD_NUMBER: _ClassVar[int]
    HOST_FIELD_NUMBER: _ClassVar[int]
    LINK_HOST_FIELD_NUMBER: _ClassVar[int]
    node: str
    workers: int
    pid: int
    host: str
    link_host: str
    def __init__(self, node: _Optional[str] = ..., workers: _Optional[int] = ..., pid: _Optional[int] = ..., host: _Optional[str] = ..., link_host: _Optional[str] = ...) -> None: ...

class WorkerStarted(_message.Message):
    __slots__ = ("worker", "pid")
    WORKER_FIELD_NUMBER: _ClassVar[int]
    PID_FIELD_NUMBER: _ClassVar[int]
    worker: int
    pid: int
    def __init__(self, worker: _Optional[int] = ..., pid: _Optional[int] = ...) -> None: ...

class WorkerExited(_message.Message):
    __slots__ = ("worker", "exit_code", "signal", "noticed_at", "last_alive_at", "progress")
    WORKER_FIELD_NUMBER: _ClassVar[int]
    EXIT_CODE_FIELD_NUMBER: _ClassVar[int]
    SIGNAL_FIELD_NUMBER: _ClassVar[int]
    NOTICED_AT_FIELD_NUMBER: _ClassVar[int]
    LAST_ALIVE_AT_FIELD_NUMBER: _ClassVar[int]
    PROGRESS_FIELD_NUMBER: _ClassVar[int]
    worker: int
    exit_code: int
    signal: int
    noticed_at: float
    last_alive_at: float
    progress: Progress
    def __init__(self, worker: _Optional[int] = ..., exit_code: _Optional[int] = ..., signal: _Optional[int] = ..., noticed_at: _Optional[float] = ..., last_alive_at: _Optional[float] = ..., progress: _Optional[_Union[Progress, _Mapping]] = ...) -> None: ...

class Progress(_message.Message):
    __slots__ = ("step", "phase", "instructions", "forward_begun", "forward_done", "backward_begun", "backward_done")
    STEP_FIELD_NUMBER: _ClassVar[int]
    PHASE_FIELD_NUMBER: _ClassVar[int]
    INSTRUCTIONS_FIELD_NUMBER: _ClassVar[int]
    FORWARD_BEGUN_FIELD_NUMBER: _ClassVar[int]
    FORWARD_DONE_FIELD_NUMBER: _ClassVar[int]
    BACKWARD_BEGUN_FIELD_NUMBER: _ClassVar[int]
    BACKWARD_DONE_FIELD_NUMBER: _ClassVar[int]
    step: int
    phase: str
    instructions: int
    forward_begun: bytes
    forward_done: bytes
    backward_begun: bytes
    backward_done: bytes
    def __init__(self, step: _Optional[int] = ..., phase: _Optional[str] = ..., instructions: _Optional[int] = ..., forward_begun: _Optional[bytes] = ..., forward_done: _Optional[bytes] = ..., backward_begun: _Optional[bytes] = ..., backward_done: _Optional[bytes] = ...) -> None: ...

class WorkerSuspected(_message.Message):
    __slots__ = ("worker", "cause", "evidence", "noticed_at", "last_alive_at", "progress")
    WORKER_FIELD_NUMBER: _ClassVar[int]
    CAUSE_FIELD_NUMBER: _ClassVar[int]
    EVIDENCE_FIELD_NUMBER: _ClassVar[int]
    NOTICED_AT_FIELD_NUMBER: _ClassVar[int]
    LAST_ALIVE_AT_FIELD_NUMBER: _ClassVar[int]
    PROGRESS_FIELD_NUMBER: _ClassVar[int]
    worker: int
    cause: str
    evidence: str
    noticed_at: float
    last_alive_at: float
    progress: Progress
    def __init__(self, worker: _Optional[int] = ..., cause: _Optional[str] = ..., evidence: _Optional[str] = ..., noticed_at: _Optional[float] = ..., last_alive_at: _Optional[float] = ..., progress: _Optional[_Union[Progress, _Mapping]] = ...) -> None: ...

class WorkerCleared(_message.Message):
    __slots__ = ("worker", "evidence")
    WORKER_FIELD_NUMBER: _ClassVar[int]
    EVIDENCE_FIELD_NUMBER: _ClassVar[int]
    worker: int
    evidence: str
    def __init__(self, worker: _Optional[int] = ..., evidence: _Optional[str] = ...) -> None: ...

class FromWorker(_message.Message):
    __slots__ = ("worker", "message", "received_at")
    WORKER_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    RECEIVED_AT_FIELD_NUMBER: _ClassVar[int]
    worker: int
    message: WorkerMessage
    received_at: float
    def __init__(self, worker: _Optional[int] = ..., message: _Optional[_Union[WorkerMessage, _Mapping]] = ..., received_at: _Optional[float] = ...) -> None: ...

class Beat(_message.Message):
    __slots__ = ("sequence",)
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    sequence: int
    def __init__(self, sequence: _Optional[int] = ...) -> None: ...

class Leave(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class AttachRequest(_message.Message):
    __slots__ = ("hello", "beat", "started", "exited", "suspected", "cleared", "from_worker", "leave")
    HELLO_FIELD_NUMBER: _ClassVar[int]
    BEAT_FIELD_NUMBER: _ClassVar[int]
    STARTED_FIELD_NUMBER: _ClassVar[int]
    EXITED_FIELD_NUMBER: _ClassVar[int]
    SUSPECTED_FIELD_NUMBER: _ClassVar[int]
    CLEARED_FIELD_NUMBER: _ClassVar[int]
    FROM_WORKER_FIELD_NUMBER: _ClassVar[int]
    LEAVE_FIELD_NUMBER: _ClassVar[int]
    hello: AgentHello
    beat: Beat
    started: WorkerStarted
    exited: WorkerExited
    suspected: WorkerSuspected
    cleared: WorkerCleared
    from_worker: FromWorker
    leave: Leave
    def __init__(self, hello: _Optional[_Union[AgentHello, _Mapping]] = ..., beat: _Optional[_Union[Beat, _Mapping]] = ..., started: _Optional[_Union[WorkerStarted, _Mapping]] = ..., exited: _Optional[_Union[WorkerExited, _Mapping]] = ..., suspected: _Optional[_Union[WorkerSuspected, _Mapping]] = ..., cleared: _Optional[_Union[WorkerCleared, _Mapping]] = ..., from_worker: _Optional[_Union[FromWorker, _Mapping]] = ..., leave: _Optional[_Union[Leave, _Mapping]] = ...) -> None: ...

class StartWorker(_message.Message):
    __slots__ = ("worker", "local_index", "incarnation", "rank", "world_size", "restart_count")
    WORKER_FIELD_NUMBER: _ClassVar[int]
    LOCAL_INDEX_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    RANK_FIELD_NUMBER: _ClassVar[int]
    WORLD_SIZE_FIELD_NUMBER: _ClassVar[int]
    RESTART_COUNT_FIELD_NUMBER: _ClassVar[int]
    worker: int
    local_index: int
    incarnation: int
    rank: int
    world_size: int
    restart_count: int
    def __init__(self, worker: _Optional[int] = ..., local_index: _Optional[int] = ..., incarnation: _Optional[int] = ..., rank: _Optional[int] = ..., world_size: _Optional[int] = ..., restart_count: _Optional[int] = ...) -> None: ...

class ToWorker(_message.Message):
    __slots__ = ("worker", "message")
    WORKER_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    worker: int
    message: AgentMessage
    def __init__(self, worker: _Optional[int] = ..., message: _Optional[_Union[AgentMessage, _Mapping]] = ...) -> None: ...

class FenceWorker(_message.Message):
    __slots__ = ("worker", "reason")
    WORKER_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    worker: int
    reason: str
    def __init__(self, worker: _Optional[int] = ..., reason: _Optional[str] = ...) -> None: ...

class Shutdown(_message.Message):
    __slots__ = ("reason",)
    REASON_FIELD_NUMBER: _ClassVar[int]
    reason: str
    def __init__(self, reason: _Optional[str] = ...) -> None: ...

class AttachResponse(_message.Message):
    __slots__ = ("beat", "start", "to_worker", "fence", "shutdown")
    BEAT_FIELD_NUMBER: _ClassVar[int]
    START_FIELD_NUMBER: _ClassVar[int]
    TO_WORKER_FIELD_NUMBER: _ClassVar[int]
    FENCE_FIELD_NUMBER: _ClassVar[int]
    SHUTDOWN_FIELD_NUMBER: _ClassVar[int]
    beat: Beat
    start: StartWorker
    to_worker: ToWorker
    fence: FenceWorker
    shutdown: Shutdown
    def __init__(self, beat: _Optional[_Union[Beat, _Mapping]] = ..., start: _Optional[_Union[StartWorker, _Mapping]] = ..., to_worker: _Optional[_Union[ToWorker, _Mapping]] = ..., fence: _Optional[_Union[FenceWorker, _Mapping]] = ..., shutdown: _Optional[_Union[Shutdown, _Mapping]] = ...) -> None: ...

class WorkerStatus(_message.Message):
    __slots__ = ("worker", "pid", "node", "local_index", "incarnation", "state", "layers", "step")
    WORKER_FIELD_NUMBER: _ClassVar[int]
    PID_FIELD_NUMBER: _ClassVar[int]
    NODE_FIELD_NUMBER: _ClassVar[int]
    LOCAL_INDEX_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    LAYERS_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    worker: int
    pid: int
    node: str
    local_index: int
    incarnation: int
    state: str
    layers: _containers.RepeatedScalarFieldContainer[int]
    step: int
    def __init__(self, worker: _Optional[int] = ..., pid: _Optional[int] = ..., node: _Optional[str] = ..., local_index: _Optional[int] = ..., incarnation: _Optional[int] = ..., state: _Optional[str] = ..., layers: _Optional[_Iterable[int]] = ..., step: _Optional[int] = ...) -> None: ...

class Incident(_message.Message):
    __slots__ = ("epoch", "cause", "evidence", "workers", "step", "phase", "detect_s", "plan_s", "edit_s", "repair_s", "delay_s", "redone_hops", "dead_hops", "step_hops", "bytes_moved", "reason", "resume_s")
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    CAUSE_FIELD_NUMBER: _ClassVar[int]
    EVIDENCE_FIELD_NUMBER: _ClassVar[int]
    WORKERS_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    PHASE_FIELD_NUMBER: _ClassVar[int]
    DETECT_S_FIELD_NUMBER: _ClassVar[int]
    PLAN_S_FIELD_NUMBER: _ClassVar[int]
    EDIT_S_FIELD_NUMBER: _ClassVar[int]
    REPAIR_S_FIELD_NUMBER: _ClassVar[int]
    DELAY_S_FIELD_NUMBER: _ClassVar[int]
    REDONE_HOPS_FIELD_NUMBER: _ClassVar[int]
    DEAD_HOPS_FIELD_NUMBER: _ClassVar[int]
    STEP_HOPS_FIELD_NUMBER: _ClassVar[int]
    BYTES_MOVED_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    RESUME_S_FIELD_NUMBER: _ClassVar[int]
    epoch: int
    cause: str
    evidence: str
    workers: _containers.RepeatedScalarFieldContainer[int]
    step: int
    phase: str
    detect_s: float
    plan_s: float
    edit_s: float
    repair_s: float
    delay_s: float
    redone_hops: int
    dead_hops: int
    step_hops: int
    bytes_moved: int
    reason: str
    resume_s: float
    def __init__(self, epoch: _Optional[int] = ..., cause: _Optional[str] = ..., evidence: _Optional[str] = ..., workers: _Optional[_Iterable[int]] = ..., step: _Optional[int] = ..., phase: _Optional[str] = ..., detect_s: _Optional[float] = ..., plan_s: _Optional[float] = ..., edit_s: _Optional[float] = ..., repair_s: _Optional[float] = ..., delay_s: _Optional[float] = ..., redone_hops: _Optional[int] = ..., dead_hops: _Optional[int] = ..., step_hops: _Optional[int] = ..., bytes_moved: _Optional[int] = ..., reason: _Optional[str] = ..., resume_s: _Optional[float] = ...) -> None: ...

class StatusRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class StatusResponse(_message.Message):
    __slots__ = ("job", "epoch", "step", "steps", "workers", "incidents", "state")
    JOB_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    STEPS_FIELD_NUMBER: _ClassVar[int]
    WORKERS_FIELD_NUMBER: _ClassVar[int]
    INCIDENTS_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    job: str
    epoch: int
    step: int
    steps: int
    workers: _containers.RepeatedCompositeFieldContainer[WorkerStatus]
    incidents: _containers.RepeatedCompositeFieldContainer[Incident]
    state: str
    def __init__(self, job: _Optional[str] = ..., epoch: _Optional[int] = ..., step: _Optional[int] = ..., steps: _Optional[int] = ..., workers: _Optional[_Iterable[_Union[WorkerStatus, _Mapping]]] = ..., incidents: _Optional[_Iterable[_Union[Incident, _Mapping]]] = ..., state: _Optional[str] = ...) -> None: ...

class InjectRequest(_message.Message):
    __slots__ = ("injection",)
    INJECTION_FIELD_NUMBER: _ClassVar[int]
    injection: Injection
    def __init__(self, injection: _Optional[_Union[Injection, _Mapping]] = ...) -> None: ...

class InjectResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class StopRequest(_message.Message):
    __slots__ = ("reason",)
    REASON_FIELD_NUMBER: _ClassVar[int]
    reason: str
    def __init__(self, reason: _Optional[str] = ...) -> None: ...

class StopResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class WatchRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class WatchResponse(_message.Message):
    __slots__ = ("step", "incident", "finished", "line", "status")
    STEP_FIELD_NUMBER: _ClassVar[int]
    INCIDENT_FIELD_NUMBER: _ClassVar[int]
    FINISHED_FIELD_NUMBER: _ClassVar[int]
    LINE_FIELD_NUMBER: _ClassVar[int]
    STATUS_FIELD_NUMBER: _ClassVar[int]
    step: StepResult
    incident: Incident
    finished: Finished
    line: UserLine
    status: StatusResponse
    def __init__(self, step: _Optional[_Union[StepResult, _Mapping]] = ..., incident: _Optional[_Union[Incident, _Mapping]] = ..., finished: _Optional[_Union[Finished, _Mapping]] = ..., line: _Optional[_Union[UserLine, _Mapping]] = ..., status: _Optional[_Union[StatusResponse, _Mapping]] = ...) -> None: ...

class Finished(_message.Message):
    __slots__ = ("exit_code", "message")
    EXIT_CODE_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    exit_code: int
    message: str
    def __init__(self, exit_code: _Optional[int] = ..., message: _Optional[str] = ...) -> None: ...
