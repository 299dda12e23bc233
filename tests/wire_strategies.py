"""Hypothesis strategies for every value that has a message."""

from hypothesis import strategies as st

from elaswave._pb import control_pb2
from elaswave.core import events
from elaswave.core.ids import NodeId, WorkerId
from elaswave.core.injection import ACTIONS, PHASES, Injection
from elaswave.core.settings import WorkerSettings
from elaswave.core.status import Finished, JobStatus, WorkerStatus

WORKER = WorkerId(3)
NODE = NodeId("n0")
RECEIVED_AT = 12.5

uint32 = st.integers(0, 2**32 - 1)
uint64 = st.integers(0, 2**64 - 1)
counts = st.integers(0, 2**63 - 1)
small = st.integers(0, 65535)
line = st.text(max_size=20)
names = st.text(min_size=1, max_size=10)
seconds = st.floats(allow_nan=False, allow_infinity=False)
anything = st.floats(allow_nan=False)


def built(kind: type, /, **fields: st.SearchStrategy[object]) -> st.SearchStrategy[object]:
    return st.builds(kind, **fields)


def tuples(of: st.SearchStrategy[object]) -> st.SearchStrategy[object]:
    return st.lists(of, max_size=4).map(tuple)


parameters = built(events.ParameterDescription, name=names, shape=tuples(counts), tie_group=uint32)
jobs = built(
    events.JobDescription,
    layers=tuples(tuples(parameters)),
    steps=st.just(50),
    micro_batches=st.integers(1, 65536),
    digest=line,
    start_step=st.integers(0, 50),
    resume_from=line,
)
results = built(
    events.StepResult,
    step=counts,
    loss=anything,
    tokens=uint64,
    samples=uint64,
    grad_norm=anything,
    skipped=st.booleans(),
)
masks = st.integers(0, 2**64)
progress_pages = built(
    events.Progress,
    step=counts,
    phase=line,
    instructions=uint64,
    forward_begun=masks,
    forward_done=masks,
    backward_begun=masks,
    backward_done=masks,
)
held = st.lists(uint32, unique=True, max_size=4).flatmap(
    lambda shards: st.tuples(
        *[built(events.HeldShard, shard=st.just(s), version=counts, reduced=tuples(counts)) for s in shards]
    )
)
told = {"worker": st.just(WORKER)}
worker_events = st.one_of(
    built(
        events.WorkerReady,
        **told,
        address=st.sampled_from(["unix:/a", "tcp:127.0.0.1:1"]),
        job=jobs,
        fingerprint=line,
    ),
    built(
        events.WorkerReport,
        **told,
        epoch=counts,
        step=counts,
        adoptions=tuples(st.tuples(counts, counts)),
        held=held,
        finished=st.booleans(),
        hosted_ready=st.booleans(),
    ),
    built(events.StepReported, **told, result=results, received_at=st.just(RECEIVED_AT)),
    built(
        events.WorkDone,
        **told,
        epoch=counts,
        step=counts,
        hops=tuples(built(events.RepairHop, micro_batch=small, first_layer=small, backward=st.booleans())),
        bytes=uint64,
        first_start=seconds,
        last_end=seconds,
    ),
    built(events.LinkBroken, **told, peer=uint32, reason=line),
    built(
        events.WorkerFailed,
        **told,
        kind=st.sampled_from(["user", "non-finite", "config", "bug"]),
        message=line,
        traceback=line,
    ),
    built(events.FinalDigest, **told, parameters=names),
    built(
        events.CheckpointWritten,
        **told,
        step=counts,
        shards=tuples(uint32),
        manifest=line,
        with_user_state=st.booleans(),
    ),
    built(events.UserLine, **told, text=line),
)
observed = {"worker": uint32, "noticed_at": seconds, "last_alive_at": seconds, "progress": progress_pages}
supervision_events = st.one_of(
    built(events.WorkerStarted, worker=uint32, pid=uint32),
    built(events.WorkerExited, **observed, exit_code=st.integers(-255, 65535), signal=st.integers(0, 64)),
    built(
        events.WorkerSuspected,
        **observed,
        cause=st.sampled_from(["stopped", "zombie", "disk-sleep", "no-progress", "killed"]),
        evidence=line,
    ),
    built(events.WorkerCleared, worker=uint32, evidence=line),
)
orders = st.one_of(
    built(
        events.StartWorker,
        node=st.just(NODE),
        worker=uint32,
        local_index=uint32,
        incarnation=uint32,
        rank=uint32,
        world_size=uint32,
        restart_count=uint32,
    ),
    built(events.FenceWorker, worker=uint32, reason=line),
)
injections = st.sampled_from(ACTIONS).flatmap(
    lambda action: built(
        Injection,
        action=st.just(action),
        worker=uint32,
        step=st.none() | counts,
        phase=st.sampled_from(PHASES),
        factor=st.floats(1.5, 100) if action == "slow" else st.just(0.0),
        during_recovery=st.booleans(),
    )
)
worker_settings = built(
    WorkerSettings,
    worker=uint32,
    node=names,
    token=line,
    run_dir=line,
    save_dir=line,
    save_every=counts,
    unbuffered=st.booleans(),
    log_cap_bytes=uint64,
    want_digest=st.booleans(),
    link_transport=st.sampled_from(["shared", "unix", "tcp"]),
    link_host=line,
    shard_elements=st.integers(1, 2**40),
)
commands = st.one_of(
    injections,
    worker_settings,
    built(events.StopRequested, reason=line),
    st.builds(control_pb2.PlanDelta, epoch=counts, reason=line),
)
incidents = built(
    events.Incident,
    epoch=counts,
    cause=line,
    evidence=line,
    workers=tuples(uint32),
    step=counts,
    phase=line,
    detect_s=seconds,
    plan_s=seconds,
    edit_s=seconds,
    repair_s=seconds,
    resume_s=seconds,
    delay_s=seconds,
    redone_hops=uint32,
    dead_hops=uint32,
    step_hops=uint32,
    bytes_moved=uint64,
    reason=line,
)
worker_statuses = built(
    WorkerStatus,
    worker=uint32,
    pid=uint32,
    node=names,
    local_index=uint32,
    incarnation=uint32,
    state=line,
    layers=st.lists(small, unique=True, max_size=4).map(tuple),
    step=counts,
)
statuses = built(
    JobStatus,
    job=line,
    epoch=counts,
    step=counts,
    steps=counts,
    state=line,
    workers=tuples(worker_statuses),
    incidents=tuples(incidents),
)
watch_items = st.one_of(
    results,
    incidents,
    statuses,
    built(events.ShowLine, text=line),
    built(Finished, exit_code=st.integers(0, 255), message=line),
)
