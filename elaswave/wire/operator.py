"""What operators are shown of a job."""

from typing import assert_never

from elaswave._pb import control_pb2
from elaswave.core.events import Incident, ShowLine, StepResult
from elaswave.core.ids import Epoch, NodeId, Step, WorkerId
from elaswave.core.status import Finished, JobStatus, WorkerStatus
from elaswave.wire import checks
from elaswave.wire.events import decode_step_result, encode_step_result
from elaswave.wire.plans import decode_layers

WatchItem = StepResult | Incident | Finished | ShowLine | JobStatus
"""What happens to a job, as operators watch it; ends after Finished."""

_MAX_EXIT = 255


def encode_watch(item: WatchItem) -> control_pb2.WatchResponse:
    """One thing that happened, as a message of the watch stream."""
    match item:
        case StepResult():
            return control_pb2.WatchResponse(step=encode_step_result(item))
        case Incident():
            return control_pb2.WatchResponse(incident=encode_incident(item))
        case Finished():
            message = checks.sendable(item.message, checks.MAX_TRACEBACK)
            return control_pb2.WatchResponse(finished=control_pb2.Finished(exit_code=item.exit_code, message=message))
        case ShowLine():
            return control_pb2.WatchResponse(
                line=control_pb2.UserLine(text=checks.sendable(item.text, checks.MAX_TEXT))
            )
        case JobStatus():
            return control_pb2.WatchResponse(status=encode_status(item))
        case _:
            assert_never(item)


def decode_watch(message: control_pb2.WatchResponse) -> WatchItem:
    """One thing that happened. Raises ProtocolError that names the field."""
    match message.WhichOneof("body"):
        case "step":
            return decode_step_result(message.step)
        case "incident":
            return decode_incident(message.incident)
        case "finished":
            return Finished(
                exit_code=checks.number("Finished.exit_code", message.finished.exit_code, 0, _MAX_EXIT),
                message=checks.text("Finished.message", message.finished.message, checks.MAX_TRACEBACK),
            )
        case "line":
            return ShowLine(text=checks.text("UserLine.text", message.line.text, checks.MAX_TEXT))
        case "status":
            return decode_status(message.status)
        case other:
            raise checks.refuse("WatchResponse.body", other, "set")


def encode_incident(incident: Incident) -> control_pb2.Incident:
    """A closed incident."""
    return control_pb2.Incident(
        epoch=incident.epoch,
        cause=checks.sendable(incident.cause, checks.MAX_TEXT),
        evidence=checks.sendable(incident.evidence, checks.MAX_TEXT),
        workers=incident.workers,
        step=incident.step,
        phase=incident.phase,
        detect_s=incident.detect_s,
        plan_s=incident.plan_s,
        edit_s=incident.edit_s,
        repair_s=incident.repair_s,
        resume_s=incident.resume_s,
        delay_s=incident.delay_s,
        redone_hops=incident.redone_hops,
        dead_hops=incident.dead_hops,
        step_hops=incident.step_hops,
        bytes_moved=incident.bytes_moved,
        reason=checks.sendable(incident.reason, checks.MAX_TEXT),
    )


def decode_incident(message: control_pb2.Incident) -> Incident:
    """A closed incident. Raises ProtocolError that names the field."""
    checks.entries("Incident.workers", message.workers)
    return Incident(
        epoch=Epoch(checks.number("Incident.epoch", message.epoch, 0, checks.MAX_STEP)),
        cause=checks.text("Incident.cause", message.cause, checks.MAX_TEXT),
        evidence=checks.text("Incident.evidence", message.evidence, checks.MAX_TEXT),
        workers=tuple(map(WorkerId, message.workers)),
        step=Step(checks.number("Incident.step", message.step, 0, checks.MAX_STEP)),
        phase=checks.text("Incident.phase", message.phase, checks.MAX_NAME),
        detect_s=checks.finite("Incident.detect_s", message.detect_s),
        plan_s=checks.finite("Incident.plan_s", message.plan_s),
        edit_s=checks.finite("Incident.edit_s", message.edit_s),
        repair_s=checks.finite("Incident.repair_s", message.repair_s),
        resume_s=checks.finite("Incident.resume_s", message.resume_s),
        delay_s=checks.finite("Incident.delay_s", message.delay_s),
        redone_hops=message.redone_hops,
        dead_hops=message.dead_hops,
        step_hops=message.step_hops,
        bytes_moved=message.bytes_moved,
        reason=checks.text("Incident.reason", message.reason, checks.MAX_TEXT),
    )


def encode_status(status: JobStatus) -> control_pb2.StatusResponse:
    """The job as its controller sees it."""
    return control_pb2.StatusResponse(
        job=status.job,
        epoch=status.epoch,
        step=status.step,
        steps=status.steps,
        workers=map(_encode_worker, status.workers),
        incidents=map(encode_incident, status.incidents),
        state=status.state,
    )


def decode_status(message: control_pb2.StatusResponse) -> JobStatus:
    """The job as its controller sees it. Raises ProtocolError that names the field."""
    checks.entries("StatusResponse.workers", message.workers)
    checks.entries("StatusResponse.incidents", message.incidents)
    return JobStatus(
        job=checks.text("StatusResponse.job", message.job, checks.MAX_NAME),
        epoch=Epoch(checks.number("StatusResponse.epoch", message.epoch, 0, checks.MAX_STEP)),
        step=Step(checks.number("StatusResponse.step", message.step, 0, checks.MAX_STEP)),
        steps=checks.number("StatusResponse.steps", message.steps, 0, checks.MAX_STEP),
        workers=tuple(_decode_worker(worker) for worker in message.workers),
        incidents=tuple(decode_incident(incident) for incident in message.incidents),
        state=checks.text("StatusResponse.state", message.state, checks.MAX_NAME),
    )


def _encode_worker(worker: WorkerStatus) -> control_pb2.WorkerStatus:
    return control_pb2.WorkerStatus(
        worker=worker.worker,
        pid=worker.pid,
        node=worker.node,
        local_index=worker.local_index,
        incarnation=worker.incarnation,
        state=worker.state,
        layers=worker.layers,
        step=worker.step,
    )


def _decode_worker(worker: control_pb2.WorkerStatus) -> WorkerStatus:
    return WorkerStatus(
        worker=WorkerId(worker.worker),
        pid=worker.pid,
        node=NodeId(checks.name("WorkerStatus.node", worker.node)),
        local_index=worker.local_index,
        incarnation=worker.incarnation,
        state=checks.text("WorkerStatus.state", worker.state, checks.MAX_NAME),
        layers=decode_layers("WorkerStatus.layers", worker.layers),
        step=Step(checks.number("WorkerStatus.step", worker.step, 0, checks.MAX_STEP)),
    )
