"""Core values to and from the messages of protos/; imports neither grpc nor torch.

Decoding checks everything that came over a wire and raises ProtocolError that names the field; encoding trusts our own
values. Messages never travel further inside a process than the module that read them, save plan deltas.
"""

from elaswave._pb.control_pb2 import AgentMessage, PlanDelta, WorkerMessage
from elaswave.wire.events import (
    WorkerEvent,
    decode_step_result,
    decode_worker_event,
    encode_step_result,
    encode_worker_event,
)
from elaswave.wire.framing import FRAME_LIMIT_BYTES, FrameDecoder, encode_frame, parse
from elaswave.wire.operator import (
    WatchItem,
    decode_incident,
    decode_status,
    decode_watch,
    encode_incident,
    encode_status,
    encode_watch,
)
from elaswave.wire.plans import apply_plan_delta, plan_delta
from elaswave.wire.supervision import (
    Command,
    Order,
    SupervisionEvent,
    decode_command,
    decode_injection,
    decode_order,
    decode_progress,
    decode_supervision,
    encode_command,
    encode_injection,
    encode_order,
    encode_progress,
    encode_supervision,
)

__all__ = [
    "FRAME_LIMIT_BYTES",
    "AgentMessage",
    "Command",
    "FrameDecoder",
    "Order",
    "PlanDelta",
    "SupervisionEvent",
    "WatchItem",
    "WorkerEvent",
    "WorkerMessage",
    "apply_plan_delta",
    "decode_command",
    "decode_incident",
    "decode_injection",
    "decode_order",
    "decode_progress",
    "decode_status",
    "decode_step_result",
    "decode_supervision",
    "decode_watch",
    "decode_worker_event",
    "encode_command",
    "encode_frame",
    "encode_incident",
    "encode_injection",
    "encode_order",
    "encode_progress",
    "encode_status",
    "encode_step_result",
    "encode_supervision",
    "encode_watch",
    "encode_worker_event",
    "parse",
    "plan_delta",
]
