"""SendQueue: the frames on their way to one peer, written by whoever can do so without waiting."""

import select
import socket
import threading
import zlib
from collections import deque
from collections.abc import Callable
from contextlib import suppress

from elaswave.comm.frames import (
    CHECKED,
    CHECKSUM,
    HEADER,
    HEADER_BYTES,
    MAGIC,
    SEQUENCE_LIMIT,
    checksum,
    encode_goodbye,
)
from elaswave.errors import ElasWaveError, PeerError

# Frames up to this are joined into one piece of memory: one copy is cheaper than one more entry for sendmsg.
JOIN_BYTES = 4096
PARTS_PER_WRITE = 64
# Bytes offered in one write by the I/O thread; then it looks after the other sockets.
WRITE_BYTES = 4 << 20

QUIET = select.EPOLLIN | select.EPOLLRDHUP
WRITABLE = QUIET | select.EPOLLOUT

Part = bytes | memoryview
Rearm = Callable[[socket.socket, int], None]


class LinkBacklog(PeerError):
    """A frame would exceed the limit of bytes that may wait for a peer; it was not taken."""


class SendQueue:
    """Frames to one peer in order; at most one thread writes to the socket at a time.

    `push` is for any thread, the rest for the I/O thread. A socket is attached while the connection is up; it is closed
    only after `detach`, so no thread can write to another socket of the same number.
    """

    def __init__(
        self, peer_name: str, *, direct_bytes: int, limit_bytes: int | None, rearm: Rearm, checksums: bool = False
    ) -> None:
        self._peer_name = peer_name
        self._direct_bytes = direct_bytes
        self._limit_bytes = limit_bytes
        self._rearm = rearm
        self._checksums = checksums
        self._lock = threading.Lock()
        self._parts: deque[Part] = deque()
        self._queued_bytes = 0
        self._sequence = 0  # of the next frame
        self._socket: socket.socket | None = None
        self._armed = False  # the loop tells when the socket is writable
        self._held = False  # all that waits does so only because more is to follow
        self._writing = False  # the I/O thread is in a write, without the lock
        self._closed: ElasWaveError | None = None  # why it takes nothing more

    @property
    def queued_bytes(self) -> int:
        """Bytes of frames that were pushed and are not yet with the kernel."""
        return self._queued_bytes

    def push(
        self, kind: int, meta: bytes, payload: memoryview | None, *, copy: bool, flags: int = 0, more: bool = False
    ) -> bool:
        """Take one frame: write it now as far as that goes without waiting, and queue the rest.

        With `more` another frame follows at once, or `release`: both are then written in one call. Returns True if it
        is the first that waits for a connection: somebody has to dial. With `copy` what must wait is copied, else
        referred to. Raises LinkBacklog over the limit (an empty queue takes any frame), and after `close` its cause.
        """
        payload_bytes = 0 if payload is None else len(payload)
        meta_bytes, payload_sum = len(meta), 0
        if self._checksums:
            flags |= CHECKED
            meta_bytes += CHECKSUM.size
            payload_sum = zlib.crc32(payload) if payload is not None else 0
        total = HEADER_BYTES + meta_bytes + payload_bytes
        with self._lock:
            if self._closed is not None or self._limit_bytes is not None:
                self._check_open(total)
            head = HEADER.pack(MAGIC, kind, flags, meta_bytes, self._sequence % SEQUENCE_LIMIT, payload_bytes)
            self._sequence += 1
            if self._checksums:
                meta += CHECKSUM.pack(checksum(head, meta, payload_sum))
            parts: list[Part] = _parts_of(head, meta, payload, total)
            # What is checked must not change: the receiver would take that for damage, and the sender for lost.
            copy |= self._checksums
            first = not self._queued_bytes
            if more and (first or self._held) and self._socket is not None and not self._writing:
                self._held = True
                self._queue(parts, total, copy=copy)
                return False
            return self._put(parts, total, copy=copy)

    def release(self) -> None:
        """Write what waits for more to follow. For the thread that pushes."""
        with self._lock:
            if self._held:
                self._put([], 0, copy=False)

    def _put(self, parts: list[Part], total: int, *, copy: bool) -> bool:
        """Write this, behind what is held, or queue it; whether it is the first that waits for a connection."""
        if self._held:
            parts, total = [*self._parts, *parts], total + self._queued_bytes
            self._parts.clear()
            self._queued_bytes, self._held = 0, False
        opened = self._socket
        first = not self._queued_bytes
        if first and opened is not None and not self._writing:
            try:
                direct = parts if total <= self._direct_bytes else _until(parts, self._direct_bytes)
                if len(direct) == 1:
                    sent = opened.send(direct[0], socket.MSG_NOSIGNAL)
                else:
                    sent = opened.sendmsg(direct, (), socket.MSG_NOSIGNAL)
            except OSError:
                # Full: the loop tells when it is writable. Broken: the loop is told so, and reports it.
                sent = 0
            if sent == total:
                return False
            parts = _after(parts, sent)
            total -= sent
        self._queue(parts, total, copy=copy)
        if opened is not None and not self._armed:
            self._armed = True
            self._rearm(opened, WRITABLE)
        return first and opened is None

    def _queue(self, parts: list[Part], total: int, *, copy: bool) -> None:
        self._parts.extend([bytes(part) for part in parts] if copy else parts)
        self._queued_bytes += total

    def _check_open(self, frame_bytes: int) -> None:
        if self._closed is not None:
            raise self._closed
        limit = self._limit_bytes
        if limit is not None and self._queued_bytes and self._queued_bytes + frame_bytes > limit:
            raise LinkBacklog(
                f"{self._queued_bytes} bytes wait for {self._peer_name}; a frame of {frame_bytes} more is over the "
                f"limit of {limit}: send it later, or raise queue_limit_bytes"
            )

    def attach(self, opened: socket.socket) -> None:
        """The connection is up: write to `opened`, what is queued first."""
        with self._lock:
            self._socket = opened
            self._armed = bool(self._parts)
            if self._armed:
                self._rearm(opened, WRITABLE)

    def write(self) -> bool:
        """Give the kernel one batch of what waits; whether the queue is empty now. Raises OSError if it is broken."""
        with self._lock:
            opened = self._socket
            if opened is None:
                return False
            batch = self._batch()
            self._writing = True
        sent = 0
        try:
            # Without the lock: copying megabytes into the kernel must not hold up a push.
            sent = opened.sendmsg(batch, (), socket.MSG_NOSIGNAL) if batch else 0
        except BlockingIOError:
            return False
        finally:
            with self._lock:
                self._writing = False
                empty = self._settle(opened, sent)
        return empty

    def _batch(self) -> list[Part]:
        batch: list[Part] = []
        size = 0
        for part in self._parts:
            batch.append(part)
            size += len(part)
            if size >= WRITE_BYTES or len(batch) == PARTS_PER_WRITE:
                break
        return batch

    def _settle(self, opened: socket.socket, sent: int) -> bool:
        """Account for `sent` bytes; with the lock held."""
        if self._closed is not None or self._socket is not opened:
            return not self._parts
        self._queued_bytes -= sent
        while sent:
            part = self._parts[0]
            if sent < len(part):
                self._parts[0] = memoryview(part)[sent:]
                break
            sent -= len(part)
            self._parts.popleft()
        if self._parts:
            return False
        if self._armed:
            self._armed = False
            self._rearm(opened, QUIET)
        return True

    def detach(self) -> None:
        """The connection is gone: drop what waits; frames pushed from here on are for the next one."""
        with self._lock:
            self._drop()

    def close(self, cause: ElasWaveError) -> bool:
        """Drop what waits and take nothing more: `push` raises `cause`. Whether nothing did wait. Any thread."""
        with self._lock:
            whole = not self._parts and not self._writing
            self._closed = self._closed or cause
            self._parts.clear()
            self._queued_bytes, self._held = 0, False
            return whole

    def take_socket(self, *, goodbye: bool) -> None:
        """After `close`: say good-bye if `goodbye`, and let go of the socket."""
        with self._lock:
            if goodbye and self._socket is not None:
                with suppress(OSError):  # it is full, or gone
                    self._socket.send(encode_goodbye(self._sequence), socket.MSG_NOSIGNAL)
            self._drop()

    def _drop(self) -> None:
        self._parts.clear()
        self._queued_bytes, self._held = 0, False
        self._sequence = 0
        self._socket = None
        self._armed = False


def _parts_of(head: bytes, meta: bytes, payload: memoryview | None, total: int) -> list[Part]:
    if total <= JOIN_BYTES:
        return [b"".join((head, meta, payload)) if payload is not None else head + meta]
    parts: list[Part] = [head + meta] if len(meta) <= JOIN_BYTES else [head, meta]
    if payload is not None and len(payload):
        parts.append(payload)
    return parts


def _until(parts: list[Part], limit: int) -> list[Part]:
    """The first `limit` bytes."""
    cut: list[Part] = []
    for part in parts:
        if limit <= 0:
            break
        cut.append(memoryview(part)[:limit])
        limit -= len(part)
    return cut


def _after(parts: list[Part], start: int) -> list[Part]:
    """What is left after the first `start` bytes."""
    rest: list[Part] = []
    for part in parts:
        if start < len(part):
            rest.append(memoryview(part)[start:] if start else part)
        start = max(0, start - len(part))
    return rest
