"""First bytes on a worker's Unix socket to its agent.

The worker says who it is and what for; the agent answers one byte. On a LINK the progress page's descriptor travels
beside that byte, and frames of WorkerMessage and AgentMessage follow. On a REPORT one frame (WorkerFailed) follows, and
the agent answers RECEIVED.
"""

import struct
from enum import IntEnum
from typing import Final

from elaswave.core.ids import WorkerId
from elaswave.errors import ProtocolError

ACCEPTED: Final = b"\x01"
RECEIVED: Final = b"\x02"

_HELLO = struct.Struct("<4sBI")
_MARK = b"EWA1"
HELLO_BYTES: Final = _HELLO.size


class Role(IntEnum):
    """What a connection is for."""

    LINK = 1
    REPORT = 2


def encode_hello(role: Role, worker: WorkerId) -> bytes:
    """The first HELLO_BYTES bytes of a connection."""
    return _HELLO.pack(_MARK, role, worker)


def decode_hello(data: bytes) -> tuple[Role, WorkerId]:
    """Raises ProtocolError where `data` is no hello of this version."""
    mark, role, worker = _HELLO.unpack(data)
    if mark != _MARK or role not in tuple(Role):
        raise ProtocolError(f"hello {data!r} is not of this version: worker and agent must run the same ElasWave")
    return Role(role), WorkerId(worker)
