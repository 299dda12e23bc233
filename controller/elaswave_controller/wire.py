"""Messages of the two services to and from values; the only module here that knows generated code."""

from dataclasses import dataclass, replace

from elaswave._pb import control_pb2
from elaswave._pb.control_pb2_grpc import (
    AgentServiceServicer,
    OperatorServiceServicer,
    add_AgentServiceServicer_to_server,
    add_OperatorServiceServicer_to_server,
)
from elaswave.core.events import WorkerExited, WorkerSuspected
from elaswave.core.ids import NodeId, WorkerId
from elaswave.errors import ProtocolError
from elaswave.wire import (
    Command,
    SupervisionEvent,
    WorkerEvent,
    decode_supervision,
    decode_worker_event,
    encode_command,
)

AttachRequest = control_pb2.AttachRequest
AttachResponse = control_pb2.AttachResponse
StatusRequest = control_pb2.StatusRequest
StatusResponse = control_pb2.StatusResponse
InjectRequest = control_pb2.InjectRequest
InjectResponse = control_pb2.InjectResponse
StopRequest = control_pb2.StopRequest
StopResponse = control_pb2.StopResponse
WatchRequest = control_pb2.WatchRequest
WatchResponse = control_pb2.WatchResponse

__all__ = [
    "AgentHello",
    "AgentServiceServicer",
    "AttachRequest",
    "AttachResponse",
    "Beat",
    "InjectRequest",
    "InjectResponse",
    "Leave",
    "OperatorServiceServicer",
    "StatusRequest",
    "StatusResponse",
    "StopRequest",
    "StopResponse",
    "WatchRequest",
    "WatchResponse",
    "add_AgentServiceServicer_to_server",
    "add_OperatorServiceServicer_to_server",
    "beat_response",
    "command_response",
    "decode_attach",
    "decode_hello",
    "shutdown_response",
]

_MAX_NODE_NAME = 255
_MAX_WORKERS_OF_NODE = 1 << 16


@dataclass(frozen=True, slots=True, kw_only=True)
class AgentHello:
    """The first message of an agent. host: name of the machine. link_host: numeric, where its workers accept links."""

    node: NodeId
    workers: int
    pid: int
    host: str
    link_host: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Beat:
    """A sign of life of an agent."""

    sequence: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Leave:
    """The agent ends on purpose; what follows is no crash."""


def decode_hello(message: AttachRequest) -> AgentHello:
    """The hello that has to come first. Raises ProtocolError."""
    kind = message.WhichOneof("body")
    if kind != "hello":
        raise ProtocolError(f"the first message of an agent is {kind}: it must be hello")
    hello = message.hello
    if not 0 < len(hello.node) <= _MAX_NODE_NAME or not hello.node.isprintable():
        raise ProtocolError(f"AgentHello.node {hello.node[:80]!r}: must be 1 to {_MAX_NODE_NAME} printable characters")
    if not 1 <= hello.workers <= _MAX_WORKERS_OF_NODE:
        raise ProtocolError(f"AgentHello.workers {hello.workers}: must be from 1 to {_MAX_WORKERS_OF_NODE}")
    return AgentHello(
        node=NodeId(hello.node),
        workers=hello.workers,
        pid=hello.pid,
        host=hello.host[:_MAX_NODE_NAME],
        link_host=hello.link_host[:_MAX_NODE_NAME],
    )


def decode_attach(
    message: AttachRequest, *, now: float, same_clock: bool
) -> SupervisionEvent | WorkerEvent | Beat | Leave:
    """Any later message of an agent, in the controller's time (CLOCK_MONOTONIC seconds, received at `now`).

    `same_clock`: the agent runs on this machine; else its times are taken as distances. Raises ProtocolError.
    """
    match message.WhichOneof("body"):
        case "beat":
            return Beat(sequence=message.beat.sequence)
        case "leave":
            return Leave()
        case "from_worker":
            told = message.from_worker
            received_at = told.received_at if same_clock and told.received_at > 0.0 else now
            return decode_worker_event(WorkerId(told.worker), told.message, received_at)
        case "hello":
            raise ProtocolError("an agent said hello twice on one stream")
        case _:
            event = decode_supervision(message)
            if same_clock or not isinstance(event, WorkerExited | WorkerSuspected):
                return event
            return replace(event, noticed_at=now, last_alive_at=now - (event.noticed_at - event.last_alive_at))


def beat_response(sequence: int) -> AttachResponse:
    """Answer to a beat: the agent knows that it is not cut off."""
    return AttachResponse(beat=control_pb2.Beat(sequence=sequence))


def command_response(worker: WorkerId, command: Command) -> AttachResponse:
    """A message for one worker, through its agent."""
    return AttachResponse(to_worker=control_pb2.ToWorker(worker=worker, message=encode_command(command)))


def shutdown_response(reason: str) -> AttachResponse:
    """End all workers, say Leave and go."""
    return AttachResponse(shutdown=control_pb2.Shutdown(reason=reason))
