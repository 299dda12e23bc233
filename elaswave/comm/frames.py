"""Frames: how messages lie on a link, and cutting a byte stream into them without copying payloads. No I/O here.

A frame is a header of 24 bytes, little-endian, then `meta_bytes` bytes of meta, then `payload_bytes` bytes of payload:

    offset  0  magic          u32   0x4B4C5745 ("EWLK")
            4  kind           u16   meaning is the caller's
            6  flags          u16   bit 0: good-bye, the last frame, without meta and payload
                                    bit 1: shared, the payload says where in shared memory the real one lies
                                    bit 2: checked, the last 4 bytes of the meta are `checksum` of all the rest
            8  meta_bytes     u32   at most META_LIMIT_BYTES
           12  sequence       u32   frames of this connection before this one, modulo 2^32
           16  payload_bytes  u64   at most the limit given to the reader
"""

import struct
import zlib
from collections.abc import Callable
from ctypes import addressof, c_char

import numpy as np
from numpy.typing import NDArray

from elaswave.errors import LinkClosed, ProtocolError

MAGIC = 0x4B4C5745
HEADER = struct.Struct("<IHHIIQ")
HEADER_BYTES = HEADER.size
META_LIMIT_BYTES = 1 << 20
KIND_LIMIT = 1 << 16
SEQUENCE_LIMIT = 1 << 32
GOODBYE = 1
SHARED = 2
CHECKED = 4
CHECKSUM = struct.Struct("<I")

ALIGNMENT_BYTES = 64
# What is read ahead in one call: many small frames, while the head of a large payload that lands here, and is
# copied once more, stays small against the payload.
STAGING_BYTES = 32 << 10

NO_PAYLOAD: NDArray[np.uint8] = np.empty(0, dtype=np.uint8)

Deliver = Callable[[int, bytes, NDArray[np.uint8]], None]
"""Takes kind, meta and payload of one frame."""

Reserve = Callable[[int], NDArray[np.uint8]]
"""Gives memory for a payload of so many bytes, which starts at a multiple of 64. Raises MemoryError."""

Borrow = Callable[[bytes, int], NDArray[np.uint8]]
"""Finds a payload in shared memory by its description, at most so many bytes. Raises PeerError."""


def encode_header(*, kind: int, meta_bytes: int, payload_bytes: int, sequence: int, flags: int = 0) -> bytes:
    """The 24 bytes before meta and payload; the caller has checked the limits."""
    return HEADER.pack(MAGIC, kind, flags, meta_bytes, sequence % SEQUENCE_LIMIT, payload_bytes)


def encode_goodbye(sequence: int) -> bytes:
    """The frame that says: closed on purpose, nothing follows."""
    return encode_header(kind=0, meta_bytes=0, payload_bytes=0, sequence=sequence, flags=GOODBYE)


def check_frame(kind: int, meta_bytes: int, payload_bytes: int, payload_limit_bytes: int) -> None:
    """Raise ProtocolError if a frame of these sizes may not be sent."""
    if not 0 <= kind < KIND_LIMIT:
        raise ProtocolError(f"frame kind {kind} is not within 0..{KIND_LIMIT - 1}")
    if meta_bytes > META_LIMIT_BYTES:
        raise ProtocolError(
            f"meta of {meta_bytes} bytes is over the limit of {META_LIMIT_BYTES}: move it to the payload"
        )
    if payload_bytes > payload_limit_bytes:
        raise ProtocolError(
            f"payload of {payload_bytes} bytes is over the limit of {payload_limit_bytes}: split it, or raise "
            "payload_limit_bytes on all workers"
        )


def checksum(head: bytes, meta: bytes | memoryview, payload_sum: int) -> int:
    """CRC-32 of the payload, then the meta, then the header. payload_sum: that of the payload alone, 0 for none."""
    return zlib.crc32(head, zlib.crc32(meta, payload_sum))


def aligned_buffer(nbytes: int) -> NDArray[np.uint8]:
    """Uninitialised bytes that start at a multiple of 64, so that any dtype and vector kernel may view them.

    numpy and torch.empty cost the same here; numpy asks for huge pages from 4 MiB on and keeps torch out of links.
    """
    return aligned(np.empty(nbytes + ALIGNMENT_BYTES - 1, dtype=np.uint8), nbytes)


def aligned(block: NDArray[np.uint8], nbytes: int) -> NDArray[np.uint8]:
    """The first `nbytes` bytes of a longer block that start at a multiple of 64."""
    start = -addressof(c_char.from_buffer(block.data)) % ALIGNMENT_BYTES
    return block[start : start + nbytes]


class FrameReader:
    """Cuts the bytes of one connection into frames: receive into `buffer()`, then tell `advance(count)`.

    While a payload is under way `buffer()` is the unfilled part of the payload itself. Lengths are checked before
    anything is allocated by them. After ProtocolError the connection is of no use any more.
    """

    def __init__(
        self,
        payload_limit_bytes: int,
        deliver: Deliver,
        borrow: Borrow | None = None,
        *,
        checksums: bool = False,
        reserve: Reserve | None = None,
    ) -> None:
        """`borrow`: None where frames may not refer to shared memory. checksums: frames without one are refused.

        reserve: where payloads get their memory, whose length has been checked; None: always fresh.
        """
        self._limit = payload_limit_bytes
        self._deliver = deliver
        self._borrow = borrow
        self._reserve = reserve if reserve is not None else aligned_buffer
        self._staging = memoryview(bytearray(STAGING_BYTES))
        self._start = 0
        self._end = 0  # bytes received and not yet used are staging[start:end]
        self._needed = HEADER_BYTES  # from start on, to get any further
        self._in_body = False  # the header of the frame under way is checked; the next four are from it
        self._flags = 0
        self._kind = 0
        self._meta_bytes = 0
        self._payload_bytes = 0
        self._meta = b""
        self._payload = NO_PAYLOAD
        self._rest: memoryview | None = None  # part of the payload that is still to come
        self._sequence = 0
        self._goodbye = False
        self._must_check = checksums
        self._head = b""

    @property
    def goodbye(self) -> bool:
        """Whether the sender has said that nothing follows."""
        return self._goodbye

    @property
    def inside_frame(self) -> bool:
        """Whether the stream, if it ended here, would end in the middle of a frame."""
        return self._rest is not None or self._end > self._start

    def buffer(self) -> memoryview:
        """Where the next bytes of the stream belong; never empty."""
        if self._rest is not None:
            return self._rest
        return self._staging[self._end : max(STAGING_BYTES, self._needed)]

    def advance(self, count: int) -> None:
        """Account for `count` bytes that were written to the front of `buffer()`; delivers the frames they complete.

        Raises ProtocolError for what no sender should have sent, LinkClosed if there is no memory for a payload;
        frames before it are delivered.
        """
        if self._rest is not None:
            if count < len(self._rest):
                self._rest = self._rest[count:]
            else:
                self._finish()
            return
        self._end += count
        while self._rest is None and self._end - self._start >= self._needed:
            if self._in_body:
                self._fill()
            else:
                self._open()
        self._compact()

    def _open(self) -> None:
        header = HEADER.unpack_from(self._staging, self._start)
        magic, kind, flags, meta_bytes, sequence, payload_bytes = header
        if (
            flags
            or magic != MAGIC
            or sequence != self._sequence
            or meta_bytes > META_LIMIT_BYTES
            or payload_bytes > self._limit
            or self._goodbye
            or self._must_check
        ):
            self._inspect(header)
        self._sequence = (sequence + 1) % SEQUENCE_LIMIT
        if self._goodbye:
            self._start += HEADER_BYTES
            return
        self._flags, self._kind, self._meta_bytes, self._payload_bytes = flags, kind, meta_bytes, payload_bytes
        self._needed = HEADER_BYTES + meta_bytes
        self._in_body = True

    def _inspect(self, header: tuple[int, ...]) -> None:
        """Everything that can be wrong with a header, and what is not as in most of them."""
        magic, kind, flags, meta_bytes, sequence, payload_bytes = header
        if magic != MAGIC:
            raise ProtocolError(f"frame {self._sequence} starts with {magic:#010x}, not with {MAGIC:#010x}")
        if self._goodbye:
            raise ProtocolError(f"frame {self._sequence} of kind {kind} after the good-bye")
        if sequence != self._sequence:
            raise ProtocolError(f"frame of kind {kind} has sequence {sequence} where {self._sequence} was due")
        rest = flags & ~CHECKED
        if rest not in (0, GOODBYE) and not (rest == SHARED and self._borrow is not None):
            raise ProtocolError(f"frame {sequence} of kind {kind} has unknown flags {flags:#06x}")
        self._goodbye = rest == GOODBYE
        self._take_checking(flags, kind, sequence, meta_bytes)
        check_frame(kind, meta_bytes - (CHECKSUM.size if flags & CHECKED else 0), payload_bytes, self._limit)
        if self._goodbye and meta_bytes + payload_bytes:
            raise ProtocolError(f"good-bye with {meta_bytes} bytes of meta and {payload_bytes} of payload, not none")

    def _take_checking(self, flags: int, kind: int, sequence: int, meta_bytes: int) -> None:
        checked = bool(flags & CHECKED)
        if checked and meta_bytes < CHECKSUM.size:
            raise ProtocolError(f"frame {sequence} of kind {kind} has {meta_bytes} bytes of meta: no checksum fits in")
        if self._must_check and not checked and not self._goodbye:
            raise ProtocolError(
                f"frame {sequence} of kind {kind} has no checksum: set LinkOptions.checksums on all workers, or on none"
            )

    def _fill(self) -> None:
        """Take the meta, and the part of the payload that is here."""
        staging, nbytes = self._staging, self._payload_bytes
        meta_at = self._start + HEADER_BYTES
        payload_at = meta_at + self._meta_bytes
        if self._flags:
            self._head = bytes(staging[self._start : meta_at])
        self._meta = bytes(staging[meta_at:payload_at])
        self._start = payload_at
        self._needed = HEADER_BYTES
        self._in_body = False
        if not nbytes:
            self._finish()
            return
        try:
            self._payload = self._reserve(nbytes)
        except MemoryError as error:
            raise LinkClosed(f"no memory for a payload of {nbytes} bytes; the link is closed") from error
        here = min(nbytes, self._end - payload_at)
        view = self._payload.data
        view[:here] = staging[payload_at : payload_at + here]
        self._start = payload_at + here
        if here < nbytes:
            self._rest = view[here:]
        else:
            self._finish()

    def _finish(self) -> None:
        payload, self._payload, self._rest = self._payload, NO_PAYLOAD, None
        if self._flags:
            payload = self._resolve(payload)
        self._deliver(self._kind, self._meta, payload)

    def _resolve(self, payload: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """Check the frame under way as its flags say, and find its real payload."""
        if self._flags & CHECKED:
            self._check(payload)
        if not self._flags & SHARED or self._borrow is None:
            return payload
        if not payload.size:
            raise ProtocolError(f"frame of kind {self._kind} says that its payload is shared, not where")
        return self._borrow(payload.tobytes(), self._limit)

    def _check(self, payload: NDArray[np.uint8]) -> None:
        """Compare the checksum, and cut it off the meta."""
        end = len(self._meta) - CHECKSUM.size
        (given,) = CHECKSUM.unpack_from(self._meta, end)
        self._meta = self._meta[:end]
        found = checksum(self._head, self._meta, zlib.crc32(payload.data))
        if found != given:
            raise ProtocolError(
                f"frame of kind {self._kind} with {payload.size} bytes of payload has checksum {found:#010x}, its "
                f"sender says {given:#010x}: it was damaged on its way"
            )

    def _compact(self) -> None:
        """Move what is left to the front, and make room if the frame's meta needs more than the staging has."""
        left = self._end - self._start
        if not left:
            self._start = self._end = 0
            return
        if self._needed > len(self._staging):
            larger = memoryview(bytearray(self._needed))
            larger[:left] = self._staging[self._start : self._end]
            self._staging = larger
        elif self._start:
            self._staging[:left] = self._staging[self._start : self._end]
        self._start, self._end = 0, left
