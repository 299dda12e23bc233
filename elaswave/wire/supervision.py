"""What agents and the controller tell each other about workers, and what agents tell workers."""

import math
from typing import assert_never

from elaswave._pb import control_pb2
from elaswave.core.events import (
    FenceWorker,
    Progress,
    StartWorker,
    StopRequested,
    WorkerCleared,
    WorkerExited,
    WorkerStarted,
    WorkerSuspected,
)
from elaswave.core.ids import NodeId, Step, WorkerId
from elaswave.core.injection import ACTIONS, PHASES, Injection
from elaswave.core.settings import LINK_TRANSPORTS, WorkerSettings
from elaswave.wire import checks

SupervisionEvent = WorkerStarted | WorkerExited | WorkerSuspected | WorkerCleared
"""Events that an agent tells of its workers."""

Order = StartWorker | FenceWorker
"""Effects that an agent carries out."""

Command = control_pb2.PlanDelta | Injection | StopRequested | WorkerSettings
"""What a worker is told; settings come first, once."""

SUSPICION_CAUSES = ("stopped", "zombie", "disk-sleep", "no-progress", "killed")
_MAX_MASK_BYTES = checks.MAX_MICRO_BATCHES // 8
_MAX_SIGNAL = 64


# ------------------------------------------------------------------ agent -> controller


def encode_supervision(event: SupervisionEvent) -> control_pb2.AttachRequest:
    """An agent's observation as a message of its stream."""
    match event:
        case WorkerStarted():
            return control_pb2.AttachRequest(started=control_pb2.WorkerStarted(worker=event.worker, pid=event.pid))
        case WorkerExited():
            return control_pb2.AttachRequest(exited=_encode_exited(event))
        case WorkerSuspected():
            return control_pb2.AttachRequest(suspected=_encode_suspected(event))
        case WorkerCleared():
            evidence = checks.sendable(event.evidence, checks.MAX_TEXT)
            cleared = control_pb2.WorkerCleared(worker=event.worker, evidence=evidence)
            return control_pb2.AttachRequest(cleared=cleared)
        case _:
            assert_never(event)


def decode_supervision(message: control_pb2.AttachRequest) -> SupervisionEvent:
    """The observation in `message`. Raises ProtocolError that names the field, also where it is no observation."""
    match message.WhichOneof("body"):
        case "started":
            return WorkerStarted(worker=WorkerId(message.started.worker), pid=message.started.pid)
        case "exited":
            return _decode_exited(message.exited)
        case "suspected":
            return _decode_suspected(message.suspected)
        case "cleared":
            evidence = checks.text("WorkerCleared.evidence", message.cleared.evidence, checks.MAX_TEXT)
            return WorkerCleared(worker=WorkerId(message.cleared.worker), evidence=evidence)
        case other:
            raise checks.refuse("AttachRequest.body", other, "started, exited, suspected or cleared")


def _encode_exited(event: WorkerExited) -> control_pb2.WorkerExited:
    return control_pb2.WorkerExited(
        worker=event.worker,
        exit_code=event.exit_code,
        signal=event.signal,
        noticed_at=event.noticed_at,
        last_alive_at=event.last_alive_at,
        progress=encode_progress(event.progress),
    )


def _decode_exited(message: control_pb2.WorkerExited) -> WorkerExited:
    return WorkerExited(
        worker=WorkerId(message.worker),
        exit_code=message.exit_code,
        signal=checks.number("WorkerExited.signal", message.signal, 0, _MAX_SIGNAL),
        noticed_at=checks.finite("WorkerExited.noticed_at", message.noticed_at),
        last_alive_at=checks.finite("WorkerExited.last_alive_at", message.last_alive_at),
        progress=decode_progress(message.progress),
    )


def _encode_suspected(event: WorkerSuspected) -> control_pb2.WorkerSuspected:
    return control_pb2.WorkerSuspected(
        worker=event.worker,
        cause=event.cause,
        evidence=checks.sendable(event.evidence, checks.MAX_TEXT),
        noticed_at=event.noticed_at,
        last_alive_at=event.last_alive_at,
        progress=encode_progress(event.progress),
    )


def _decode_suspected(message: control_pb2.WorkerSuspected) -> WorkerSuspected:
    return WorkerSuspected(
        worker=WorkerId(message.worker),
        cause=checks.one_of("WorkerSuspected.cause", message.cause, SUSPICION_CAUSES),
        evidence=checks.text("WorkerSuspected.evidence", message.evidence, checks.MAX_TEXT),
        noticed_at=checks.finite("WorkerSuspected.noticed_at", message.noticed_at),
        last_alive_at=checks.finite("WorkerSuspected.last_alive_at", message.last_alive_at),
        progress=decode_progress(message.progress),
    )


def encode_progress(progress: Progress) -> control_pb2.Progress:
    """A progress page; masks as little-endian bytes without zeros at the end."""
    return control_pb2.Progress(
        step=progress.step,
        phase=progress.phase,
        instructions=progress.instructions,
        forward_begun=_encode_mask(progress.forward_begun),
        forward_done=_encode_mask(progress.forward_done),
        backward_begun=_encode_mask(progress.backward_begun),
        backward_done=_encode_mask(progress.backward_done),
    )


def decode_progress(message: control_pb2.Progress) -> Progress:
    """A progress page. Raises ProtocolError that names the field."""
    return Progress(
        step=Step(checks.number("Progress.step", message.step, 0, checks.MAX_STEP)),
        phase=checks.text("Progress.phase", message.phase, checks.MAX_NAME),
        instructions=message.instructions,
        forward_begun=_decode_mask("Progress.forward_begun", message.forward_begun),
        forward_done=_decode_mask("Progress.forward_done", message.forward_done),
        backward_begun=_decode_mask("Progress.backward_begun", message.backward_begun),
        backward_done=_decode_mask("Progress.backward_done", message.backward_done),
    )


def _encode_mask(mask: int) -> bytes:
    return mask.to_bytes((mask.bit_length() + 7) // 8, "little")


def _decode_mask(field: str, data: bytes) -> int:
    checks.entries(f"bytes of {field}", data, _MAX_MASK_BYTES)
    return int.from_bytes(data, "little")


# ------------------------------------------------------------------ controller -> agent


def encode_order(order: Order) -> control_pb2.AttachResponse:
    """An effect for the agent; the node is that of the stream."""
    match order:
        case StartWorker():
            start = control_pb2.StartWorker(
                worker=order.worker,
                local_index=order.local_index,
                incarnation=order.incarnation,
                rank=order.rank,
                world_size=order.world_size,
                restart_count=order.restart_count,
            )
            return control_pb2.AttachResponse(start=start)
        case FenceWorker():
            reason = checks.sendable(order.reason, checks.MAX_TEXT)
            return control_pb2.AttachResponse(fence=control_pb2.FenceWorker(worker=order.worker, reason=reason))
        case _:
            assert_never(order)


def decode_order(node: NodeId, message: control_pb2.AttachResponse) -> Order:
    """What the agent of `node` is to do. Raises ProtocolError that names the field, also where it is no order."""
    match message.WhichOneof("body"):
        case "start":
            start = message.start
            return StartWorker(
                node=node,
                worker=WorkerId(start.worker),
                local_index=start.local_index,
                incarnation=start.incarnation,
                rank=start.rank,
                world_size=start.world_size,
                restart_count=start.restart_count,
            )
        case "fence":
            reason = checks.text("FenceWorker.reason", message.fence.reason, checks.MAX_TEXT)
            return FenceWorker(worker=WorkerId(message.fence.worker), reason=reason)
        case other:
            raise checks.refuse("AttachResponse.body", other, "start or fence")


# ------------------------------------------------------------------ agent -> worker


def encode_command(command: Command) -> control_pb2.AgentMessage:
    """What a worker is told, as a message of its socket."""
    match command:
        case control_pb2.PlanDelta():
            return control_pb2.AgentMessage(plan=command)
        case Injection():
            return control_pb2.AgentMessage(injection=encode_injection(command))
        case StopRequested():
            return control_pb2.AgentMessage(
                stop=control_pb2.Stop(reason=checks.sendable(command.reason, checks.MAX_TEXT))
            )
        case WorkerSettings():
            return control_pb2.AgentMessage(settings=_encode_settings(command))
        case _:
            assert_never(command)


def decode_command(message: control_pb2.AgentMessage) -> Command:
    """What the worker is told. A plan stays a delta: see apply_plan_delta. Raises ProtocolError naming the field."""
    match message.WhichOneof("body"):
        case "plan":
            return message.plan
        case "injection":
            return decode_injection(message.injection)
        case "stop":
            return StopRequested(reason=checks.text("Stop.reason", message.stop.reason, checks.MAX_TEXT))
        case "settings":
            return _decode_settings(message.settings)
        case other:
            raise checks.refuse("AgentMessage.body", other, "set")


def encode_injection(injection: Injection) -> control_pb2.Injection:
    """A fault asked for on purpose."""
    return control_pb2.Injection(
        action=injection.action,
        worker=injection.worker,
        step=injection.step,
        phase=injection.phase,
        factor=injection.factor,
        during_recovery=injection.during_recovery,
    )


def decode_injection(message: control_pb2.Injection) -> Injection:
    """A fault asked for on purpose. Raises ProtocolError that names the field."""
    slow = checks.one_of("Injection.action", message.action, ACTIONS) == "slow"
    if slow and not 1.0 < message.factor < math.inf:
        raise checks.refuse("Injection.factor", message.factor, "a finite number above 1")
    has_step = message.HasField("step")
    return Injection(
        action=message.action,
        worker=WorkerId(message.worker),
        step=Step(checks.number("Injection.step", message.step, 0, checks.MAX_STEP)) if has_step else None,
        phase=checks.one_of("Injection.phase", message.phase, PHASES),
        factor=message.factor if slow else 0.0,
        during_recovery=message.during_recovery,
    )


def _encode_settings(settings: WorkerSettings) -> control_pb2.Settings:
    return control_pb2.Settings(
        token=settings.token,
        run_dir=settings.run_dir,
        save_dir=settings.save_dir,
        save_every=settings.save_every,
        unbuffered=settings.unbuffered,
        log_cap_bytes=settings.log_cap_bytes,
        worker=settings.worker,
        node=settings.node,
        want_digest=settings.want_digest,
        link_transport=settings.link_transport,
        link_host=settings.link_host,
        resume_from=settings.resume_from,
        shard_elements=settings.shard_elements,
    )


def _decode_settings(message: control_pb2.Settings) -> WorkerSettings:
    return WorkerSettings(
        worker=WorkerId(message.worker),
        node=NodeId(checks.name("Settings.node", message.node)),
        token=checks.text("Settings.token", message.token, checks.MAX_NAME),
        run_dir=checks.text("Settings.run_dir", message.run_dir, checks.MAX_TEXT),
        save_dir=checks.text("Settings.save_dir", message.save_dir, checks.MAX_TEXT),
        save_every=checks.number("Settings.save_every", message.save_every, 0, checks.MAX_STEP),
        unbuffered=message.unbuffered,
        log_cap_bytes=message.log_cap_bytes,
        want_digest=message.want_digest,
        link_transport=checks.one_of("Settings.link_transport", message.link_transport, LINK_TRANSPORTS),
        link_host=checks.text("Settings.link_host", message.link_host, checks.MAX_NAME),
        resume_from=checks.text("Settings.resume_from", message.resume_from, checks.MAX_TEXT),
        shard_elements=checks.number("Settings.shard_elements", message.shard_elements, 1, checks.MAX_STEP),
    )
