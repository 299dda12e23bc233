"""Worker messages and what agents tell of workers, to and from the events of elaswave.core.events."""

from typing import assert_never

from elaswave._pb import control_pb2
from elaswave.core.events import (
    CheckpointWritten,
    FinalDigest,
    HeldShard,
    JobDescription,
    LinkBroken,
    ParameterDescription,
    RepairHop,
    StepReported,
    StepResult,
    UserLine,
    WorkDone,
    WorkerFailed,
    WorkerReady,
    WorkerReport,
)
from elaswave.core.ids import Epoch, Layer, MicroBatch, ShardId, Step, WorkerId
from elaswave.wire import checks
from elaswave.wire.plans import decode_address

WorkerEvent = (
    WorkerReady | WorkerReport | StepReported | WorkDone | LinkBroken | WorkerFailed | FinalDigest | CheckpointWritten
    | UserLine
)  # fmt: skip
"""Events that a worker itself tells."""

FAILURE_KINDS = ("user", "non-finite", "config", "bug")
_MAX_DIMENSIONS = 16
_MAX_SAMPLES = 2**64 - 1


def encode_worker_event(event: WorkerEvent) -> control_pb2.WorkerMessage:
    """`event` without the worker's id, which the receiving end of the socket knows better.

    Texts that are too long are cut: lines and messages at the end, tracebacks at the beginning.
    """
    match event:
        case WorkerReady():
            return control_pb2.WorkerMessage(ready=_encode_ready(event))
        case WorkerReport():
            return control_pb2.WorkerMessage(report=_encode_report(event))
        case StepReported():
            return control_pb2.WorkerMessage(step_result=encode_step_result(event.result))
        case WorkDone():
            return control_pb2.WorkerMessage(work_done=_encode_work_done(event))
        case LinkBroken():
            reason = checks.sendable(event.reason, checks.MAX_TEXT)
            return control_pb2.WorkerMessage(link_broken=control_pb2.LinkBroken(peer=event.peer, reason=reason))
        case WorkerFailed():
            return control_pb2.WorkerMessage(failed=_encode_failed(event))
        case FinalDigest():
            return control_pb2.WorkerMessage(digest=control_pb2.FinalDigest(parameters=event.parameters))
        case CheckpointWritten():
            shard = control_pb2.CheckpointShard(
                step=event.step,
                manifest=event.manifest,
                shards=event.shards,
                with_user_state=event.with_user_state,
            )
            return control_pb2.WorkerMessage(checkpoint=shard)
        case UserLine():
            line = control_pb2.UserLine(text=checks.sendable(event.text, checks.MAX_TEXT))
            return control_pb2.WorkerMessage(line=line)
        case _:
            assert_never(event)


def decode_worker_event(worker: WorkerId, message: control_pb2.WorkerMessage, received_at: float) -> WorkerEvent:
    """What `worker` tells; `received_at` is CLOCK_MONOTONIC seconds. Raises ProtocolError that names the field."""
    match message.WhichOneof("body"):
        case "ready":
            return _decode_ready(worker, message.ready)
        case "report":
            return _decode_report(worker, message.report)
        case "step_result":
            result = decode_step_result(message.step_result)
            return StepReported(worker=worker, result=result, received_at=received_at)
        case "work_done":
            return _decode_work_done(worker, message.work_done)
        case "link_broken":
            reason = checks.text("LinkBroken.reason", message.link_broken.reason, checks.MAX_TEXT)
            return LinkBroken(worker=worker, peer=WorkerId(message.link_broken.peer), reason=reason)
        case "failed":
            return _decode_failed(worker, message.failed)
        case "digest":
            digest = checks.name("FinalDigest.parameters", message.digest.parameters)
            return FinalDigest(worker=worker, parameters=digest)
        case "checkpoint":
            return _decode_checkpoint(worker, message.checkpoint)
        case "line":
            return UserLine(worker=worker, text=checks.text("UserLine.text", message.line.text, checks.MAX_TEXT))
        case other:
            raise checks.refuse("WorkerMessage.body", other, "set")


def _step(field: str, value: int) -> Step:
    return Step(checks.number(field, value, 0, checks.MAX_STEP))


def _epoch(field: str, value: int) -> Epoch:
    return Epoch(checks.number(field, value, 0, checks.MAX_STEP))


# ------------------------------------------------------------------ ready


def _encode_ready(event: WorkerReady) -> control_pb2.WorkerReady:
    job = event.job
    return control_pb2.WorkerReady(
        address=event.address,
        fingerprint=event.fingerprint,
        job=control_pb2.JobDescription(
            layers=[control_pb2.LayerDescription(parameters=map(_encode_parameter, layer)) for layer in job.layers],
            steps=job.steps,
            micro_batches=job.micro_batches,
            digest=job.digest,
            start_step=job.start_step,
            resume_from=job.resume_from,
        ),
    )


def _decode_ready(worker: WorkerId, message: control_pb2.WorkerReady) -> WorkerReady:
    return WorkerReady(
        worker=worker,
        address=decode_address("WorkerReady.address", message.address),
        job=_decode_job(message.job),
        fingerprint=checks.text("WorkerReady.fingerprint", message.fingerprint, checks.MAX_NAME),
    )


def _decode_job(job: control_pb2.JobDescription) -> JobDescription:
    checks.entries("JobDescription.layers", job.layers, checks.MAX_LAYERS)
    steps = checks.number("JobDescription.steps", job.steps, 0, checks.MAX_STEP)
    return JobDescription(
        layers=tuple(_decode_layer(layer) for layer in job.layers),
        steps=steps,
        micro_batches=checks.number("JobDescription.micro_batches", job.micro_batches, 1, checks.MAX_MICRO_BATCHES),
        digest=checks.text("JobDescription.digest", job.digest, checks.MAX_NAME),
        start_step=Step(checks.number("JobDescription.start_step", job.start_step, 0, steps)),
        resume_from=checks.text("JobDescription.resume_from", job.resume_from, checks.MAX_TEXT),
    )


def _encode_parameter(parameter: ParameterDescription) -> control_pb2.Parameter:
    return control_pb2.Parameter(name=parameter.name, shape=parameter.shape, tie_group=parameter.tie_group)


def _decode_layer(layer: control_pb2.LayerDescription) -> tuple[ParameterDescription, ...]:
    checks.entries("LayerDescription.parameters", layer.parameters)
    return tuple(_decode_parameter(parameter) for parameter in layer.parameters)


def _decode_parameter(parameter: control_pb2.Parameter) -> ParameterDescription:
    checks.entries("Parameter.shape", parameter.shape, _MAX_DIMENSIONS)
    return ParameterDescription(
        name=checks.name("Parameter.name", parameter.name),
        shape=tuple(checks.number("Parameter.shape", size, 0, checks.MAX_STEP) for size in parameter.shape),
        tie_group=parameter.tie_group,
    )


# ------------------------------------------------------------------ reports


def _encode_report(event: WorkerReport) -> control_pb2.WorkerReport:
    return control_pb2.WorkerReport(
        epoch=event.epoch,
        step=event.step,
        adoptions=[control_pb2.Adoption(epoch=epoch, step=step) for epoch, step in event.adoptions],
        held=[
            control_pb2.HeldShard(shard=held.shard, version=held.version, reduced=held.reduced) for held in event.held
        ],
        finished=event.finished,
        hosted_ready=event.hosted_ready,
    )


def _decode_report(worker: WorkerId, message: control_pb2.WorkerReport) -> WorkerReport:
    checks.entries("WorkerReport.adoptions", message.adoptions)
    checks.entries("WorkerReport.held", message.held)
    checks.distinct("WorkerReport.held", [held.shard for held in message.held])
    return WorkerReport(
        worker=worker,
        epoch=_epoch("WorkerReport.epoch", message.epoch),
        step=_step("WorkerReport.step", message.step),
        adoptions=tuple(
            (_epoch("Adoption.epoch", adoption.epoch), _step("Adoption.step", adoption.step))
            for adoption in message.adoptions
        ),
        held=tuple(_decode_held(held) for held in message.held),
        finished=message.finished,
        hosted_ready=message.hosted_ready,
    )


def _decode_held(held: control_pb2.HeldShard) -> HeldShard:
    checks.entries("HeldShard.reduced", held.reduced)
    return HeldShard(
        shard=ShardId(held.shard),
        version=checks.number("HeldShard.version", held.version, 0, checks.MAX_STEP),
        reduced=tuple(_step("HeldShard.reduced", step) for step in held.reduced),
    )


def encode_step_result(result: StepResult) -> control_pb2.StepResult:
    """A decided step. Loss and norm keep every bit, also where they are infinite or NaN."""
    return control_pb2.StepResult(
        step=result.step,
        loss=result.loss,
        tokens=result.tokens,
        samples=result.samples,
        grad_norm=result.grad_norm,
        skipped=result.skipped,
    )


def decode_step_result(message: control_pb2.StepResult) -> StepResult:
    """A decided step. Raises ProtocolError that names the field."""
    return StepResult(
        step=_step("StepResult.step", message.step),
        loss=message.loss,
        tokens=message.tokens,
        samples=checks.number("StepResult.samples", message.samples, 0, _MAX_SAMPLES),
        grad_norm=message.grad_norm,
        skipped=message.skipped,
    )


def _encode_work_done(event: WorkDone) -> control_pb2.WorkDone:
    return control_pb2.WorkDone(
        epoch=event.epoch,
        step=event.step,
        hops=[
            control_pb2.RepairHop(micro_batch=hop.micro_batch, first_layer=hop.first_layer, backward=hop.backward)
            for hop in event.hops
        ],
        bytes=event.bytes,
        first_start=event.first_start,
        last_end=event.last_end,
    )


def _decode_work_done(worker: WorkerId, message: control_pb2.WorkDone) -> WorkDone:
    checks.entries("WorkDone.hops", message.hops)
    return WorkDone(
        worker=worker,
        epoch=_epoch("WorkDone.epoch", message.epoch),
        step=_step("WorkDone.step", message.step),
        hops=tuple(_decode_repair_hop(hop) for hop in message.hops),
        bytes=message.bytes,
        first_start=checks.finite("WorkDone.first_start", message.first_start),
        last_end=checks.finite("WorkDone.last_end", message.last_end),
    )


def _decode_repair_hop(hop: control_pb2.RepairHop) -> RepairHop:
    last_micro_batch, last_layer = checks.MAX_MICRO_BATCHES - 1, checks.MAX_LAYERS - 1
    return RepairHop(
        micro_batch=MicroBatch(checks.number("RepairHop.micro_batch", hop.micro_batch, 0, last_micro_batch)),
        first_layer=Layer(checks.number("RepairHop.first_layer", hop.first_layer, 0, last_layer)),
        backward=hop.backward,
    )


# ------------------------------------------------------------------ endings


def _encode_failed(event: WorkerFailed) -> control_pb2.WorkerFailed:
    return control_pb2.WorkerFailed(
        kind=event.kind,
        message=checks.sendable(event.message, checks.MAX_TEXT),
        traceback=checks.sendable(event.traceback, checks.MAX_TRACEBACK, keep_end=True),
    )


def _decode_failed(worker: WorkerId, message: control_pb2.WorkerFailed) -> WorkerFailed:
    return WorkerFailed(
        worker=worker,
        kind=checks.one_of("WorkerFailed.kind", message.kind, FAILURE_KINDS),
        message=checks.text("WorkerFailed.message", message.message, checks.MAX_TEXT),
        traceback=checks.text("WorkerFailed.traceback", message.traceback, checks.MAX_TRACEBACK),
    )


def _decode_checkpoint(worker: WorkerId, message: control_pb2.CheckpointShard) -> CheckpointWritten:
    checks.entries("CheckpointShard.shards", message.shards)
    return CheckpointWritten(
        worker=worker,
        step=_step("CheckpointShard.step", message.step),
        shards=tuple(ShardId(shard) for shard in message.shards),
        manifest=checks.text("CheckpointShard.manifest", message.manifest, checks.MAX_MANIFEST),
        with_user_state=message.with_user_state,
    )
