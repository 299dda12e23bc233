"""Messages of the agent's stream: the only module of the agent that sees generated code."""

import grpc
from grpc import aio

from elaswave._pb import control_pb2
from elaswave._pb.control_pb2_grpc import AgentServiceStub
from elaswave.certificates import AUTHORITY_VARIABLE, TlsFiles
from elaswave.control_channel import KEEPALIVE_S, open_channel
from elaswave.core.events import FenceWorker, StartWorker, WorkerFailed
from elaswave.core.ids import NodeId, Step, WorkerId
from elaswave.core.injection import Injection
from elaswave.errors import ProtocolError
from elaswave.wire import (
    SupervisionEvent,
    decode_injection,
    decode_order,
    encode_frame,
    encode_supervision,
    encode_worker_event,
    parse,
)
from elaswave_agent.orders import ControllerBeat, Forward, InjectNow, Order, Shutdown

Request = control_pb2.AttachRequest
Response = control_pb2.AttachResponse
Call = aio.StreamStreamCall[Request, Response]

_CHANNEL_OPTIONS = (
    # A channel of our own: after a restart of the controller, reconnecting must not wait for others' back-off.
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1000),
    ("grpc.keepalive_time_ms", 1000),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.max_receive_message_length", 64 << 20),
    ("grpc.max_send_message_length", 64 << 20),
    # The controller's address is given; a proxy from the environment must not come between.
    ("grpc.enable_http_proxy", 0),
)


_REFUSALS = (
    grpc.StatusCode.UNAUTHENTICATED,
    grpc.StatusCode.PERMISSION_DENIED,
    grpc.StatusCode.UNIMPLEMENTED,
)
# Of gRPC's texts: it has no code for these. Should they change, the agent tries for as long as for a lost controller.
_CERTIFICATE_SIGNS = ("CERTIFICATE_VERIFY_FAILED", "Hostname Verification Check failed")


def open_stream_channel(address: str, tls: TlsFiles | None, silence_s: float) -> aio.Channel:
    """A channel to the controller at HOST:PORT; connects when it is used. ConfigError where TLS files will not do.

    silence_s: how long a connection of which nothing is heard is kept: a shorter cut of the network costs nothing.
    """
    keepalive = ("grpc.keepalive_timeout_ms", int(1000 * max(silence_s, KEEPALIVE_S)))
    return open_channel(address, tls, (*_CHANNEL_OPTIONS, keepalive))


def attach(channel: aio.Channel, token: str) -> Call:
    """Open the agent's stream. The token proves that this agent belongs to the job."""
    stub = AgentServiceStub(channel)
    call: Call = stub.Attach(metadata=(("elaswave-token", token),))
    return call


def encode_hello(node: NodeId, workers: int, pid: int, *, host: str, link_host: str) -> Request:
    """First message of a stream. host: name of the machine. link_host: numeric, where its workers accept links."""
    hello = control_pb2.AgentHello(node=node, workers=workers, pid=pid, host=host, link_host=link_host)
    return Request(hello=hello)


def encode_beat(sequence: int) -> Request:
    """Sign of life of the agent."""
    return Request(beat=control_pb2.Beat(sequence=sequence))


def encode_leave() -> Request:
    """Last message of a clean end: without it the end of a stream is the crash of a node."""
    return Request(leave=control_pb2.Leave())


def encode_event(event: SupervisionEvent) -> Request:
    """What this agent saw of a worker."""
    return encode_supervision(event)


def wrap_worker_frame(worker: WorkerId, body: bytes, received_at: float) -> Request:
    """A frame from a worker's socket, to be passed on. Raises ProtocolError where it is no WorkerMessage."""
    message = parse(control_pb2.WorkerMessage, body)
    if message.WhichOneof("body") is None:
        raise ProtocolError(f"worker {worker} sent an empty message of {len(body)} bytes: another version?")
    return Request(from_worker=control_pb2.FromWorker(worker=worker, message=message, received_at=received_at))


def is_ready(request: Request) -> bool:
    """Whether this passes on a worker's WorkerReady."""
    return request.WhichOneof("body") == "from_worker" and request.from_worker.message.HasField("ready")


def reported_step(request: Request) -> Step | None:
    """The step of which this passes on a worker's report; None for anything else."""
    if request.WhichOneof("body") != "from_worker" or not request.from_worker.message.HasField("step_result"):
        return None
    return Step(request.from_worker.message.step_result.step)


def encode_failure(failure: WorkerFailed, received_at: float) -> Request:
    """A failure that the agent tells in the name of a worker that could not even start."""
    message = encode_worker_event(failure)
    return Request(from_worker=control_pb2.FromWorker(worker=failure.worker, message=message, received_at=received_at))


def decode_response(node: NodeId, response: Response) -> Order:
    """What the controller wants. Raises ProtocolError."""
    match response.WhichOneof("body"):
        case "beat":
            return ControllerBeat(sequence=response.beat.sequence)
        case "to_worker":
            return _decode_forward(response.to_worker)
        case "shutdown":
            return Shutdown(reason=response.shutdown.reason)
        case _:
            order: StartWorker | FenceWorker = decode_order(node, response)
            return order


def _decode_forward(message: control_pb2.ToWorker) -> Forward | InjectNow:
    worker = WorkerId(message.worker)
    if message.message.WhichOneof("body") == "injection":
        injection: Injection = decode_injection(message.message.injection)
        if injection.step is None and injection.action != "slow":
            return InjectNow(worker=worker, action=injection.action)
    return Forward(worker=worker, frame=encode_frame(message.message))


def final_reason(error: aio.AioRpcError) -> str:
    """Why trying again is of no use; empty where it may be of some."""
    details = error.details() or error.code().name
    if error.code() in _REFUSALS:
        return f"the controller refuses this agent: {details}"
    if any(sign in details for sign in _CERTIFICATE_SIGNS):
        return (
            f"the controller's certificate will not do ({details}): it has to be signed by the authority that"
            f" {AUTHORITY_VARIABLE} names here, and to be for the host of the endpoint"
        )
    return ""
