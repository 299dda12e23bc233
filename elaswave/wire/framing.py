"""Frames on the Unix socket between worker and agent: a length of four bytes, big-endian, then the message."""

import struct
from typing import TypeVar

from google.protobuf.message import DecodeError, Message

from elaswave.errors import ProtocolError

FRAME_LIMIT_BYTES = 1 << 26
"""64 MiB: a plan of 10^5 workers with 100 bytes each fits six times over."""

_HEADER = struct.Struct(">I")
_MessageType = TypeVar("_MessageType", bound=Message)


def encode_frame(message: Message, limit_bytes: int = FRAME_LIMIT_BYTES) -> bytes:
    """`message` as one frame. Raises ProtocolError where it is longer than `limit_bytes`."""
    body = message.SerializeToString()
    if len(body) > limit_bytes:
        name = type(message).__name__
        raise ProtocolError(
            f"a {name} of {len(body)} bytes exceeds the limit of {limit_bytes} bytes: send less at once"
        )
    return _HEADER.pack(len(body)) + body


class FrameDecoder:
    """Cuts a stream of bytes into frames. Holds at most one incomplete frame beside what it was last fed."""

    def __init__(self, limit_bytes: int = FRAME_LIMIT_BYTES) -> None:
        self._limit_bytes = limit_bytes
        self._buffer = bytearray()
        self._announced = 0

    @property
    def pending_bytes(self) -> int:
        """Bytes of an incomplete frame; above 0 at the end of a stream, the peer died in the middle of one."""
        return len(self._buffer)

    def feed(self, data: bytes | bytearray | memoryview) -> list[bytes]:
        """Bodies of the frames that `data` completes, in order.

        Raises ProtocolError as soon as a header announces more than the limit, before room is made for it, and
        again on every later call: after that the stream has no frame boundaries.
        """
        if self._announced > self._limit_bytes:
            raise self._too_long()
        self._buffer += data
        bodies: list[bytes] = []
        start = 0
        with memoryview(self._buffer) as view:
            while (stop := self._end_of_frame(view, start)) is not None:
                bodies.append(bytes(view[start + _HEADER.size : stop]))
                start = stop
        del self._buffer[:start]
        return bodies

    def _end_of_frame(self, view: memoryview, start: int) -> int | None:
        if len(view) - start < _HEADER.size:
            return None
        (self._announced,) = _HEADER.unpack_from(view, start)
        if self._announced > self._limit_bytes:
            raise self._too_long()
        stop = start + _HEADER.size + self._announced
        return stop if stop <= len(view) else None

    def _too_long(self) -> ProtocolError:
        return ProtocolError(
            f"a frame of {self._announced} bytes is announced, the limit is {self._limit_bytes}: close the connection"
        )


def parse(kind: type[_MessageType], data: bytes) -> _MessageType:
    """`data` as a message of `kind`. Raises ProtocolError where it is none."""
    try:
        return kind.FromString(data)
    except DecodeError as error:
        raise ProtocolError(f"{len(data)} bytes are not a {kind.__name__}: {error}") from error
