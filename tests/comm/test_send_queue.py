"""The send queue: the bytes on the wire are the frames in order, however little the kernel takes at a time."""

import select
import socket
import struct

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from elaswave.comm.addresses import LinkOptions
from elaswave.comm.frames import HEADER_BYTES, FrameReader
from elaswave.comm.sending import JOIN_BYTES, WRITABLE, LinkBacklog, SendQueue
from elaswave.errors import LinkClosed


class Wire:
    """A socket with small buffers, the queue at one end, a frame reader at the other."""

    def __init__(self, direct_bytes: int = 1 << 20, limit_bytes: int | None = None) -> None:
        self.near, self.far = socket.socketpair()
        for end in (self.near, self.far):
            end.setblocking(False)
            end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 8192)
        self.armed = False
        self.queue = SendQueue("worker 7", direct_bytes=direct_bytes, limit_bytes=limit_bytes, rearm=self._rearm)
        self.frames: list[tuple[int, bytes, bytes]] = []
        self._reader = FrameReader(1 << 30, lambda kind, meta, data: self.frames.append((kind, meta, data.tobytes())))

    def _rearm(self, opened: socket.socket, events: int) -> None:
        assert opened is self.near
        self.armed = events == WRITABLE
        assert self.armed or events & select.EPOLLRDHUP

    def read(self) -> None:
        while True:
            try:
                count = self.far.recv_into(self._reader.buffer())
            except BlockingIOError:
                return
            self._reader.advance(count)

    def write(self) -> None:
        """As the loop does: only when armed."""
        if self.armed:
            empty = self.queue.write()
            assert empty == (self.queue.queued_bytes == 0)
            assert self.armed != empty

    def finish(self) -> None:
        while self.armed:
            self.write()
            self.read()
        self.read()
        assert self.queue.queued_bytes == 0
        self.near.close()
        self.far.close()


SIZES = st.one_of(st.integers(0, 200), st.sampled_from([JOIN_BYTES, 3 * JOIN_BYTES, 50_000]))
PUSHES = st.tuples(SIZES, SIZES, st.booleans(), st.booleans())
ACTIONS = st.lists(st.one_of(PUSHES, st.sampled_from(["read", "write", "up"])), max_size=25)


@given(actions=ACTIONS, direct_bytes=st.sampled_from([0, 1, 100, 5000, 1 << 20]))
def test_what_is_pushed_arrives_in_order(actions: list[tuple[int, int, bool, bool] | str], direct_bytes: int) -> None:
    wire = Wire(direct_bytes)
    up = False
    sent: list[tuple[int, bytes, bytes]] = []
    block = np.random.default_rng(0).bytes(50_000)
    for number, action in enumerate(actions):
        if isinstance(action, tuple):
            meta_bytes, payload_bytes, copy, more = action
            payload = bytearray(block[:payload_bytes])
            sent.append((number, block[:meta_bytes], bytes(payload)))
            first = not wire.queue.queued_bytes
            view = memoryview(payload) if payload else None
            must_dial = wire.queue.push(number, block[:meta_bytes], view, copy=copy, more=more)
            assert must_dial == (first and not up)
            if copy:
                payload[:] = bytes(payload_bytes)  # the caller may use it for something else at once
            continue
        wire.queue.release()
        if action == "up" and not up:
            up = True
            wire.queue.attach(wire.near)
        elif action == "read":
            wire.read()
        elif up:
            wire.write()
    wire.queue.release()
    if not up:
        wire.queue.attach(wire.near)
    wire.finish()
    assert wire.frames == sent


def test_a_frame_that_fits_is_written_by_the_caller() -> None:
    wire = Wire()
    wire.queue.attach(wire.near)
    assert not wire.queue.push(1, b"meta", memoryview(b"payload"), copy=False)
    assert not wire.armed
    wire.read()
    assert wire.frames == [(1, b"meta", b"payload")]
    wire.finish()


def test_frames_that_others_follow_are_written_with_the_last_one() -> None:
    wire = Wire()
    wire.queue.attach(wire.near)
    for number in range(3):
        assert not wire.queue.push(number, b"m", memoryview(bytes(5000)), copy=False, more=True)
        wire.read()
        assert wire.frames == [] and not wire.armed
    wire.queue.push(3, b"m", None, copy=False)
    wire.read()
    wire.queue.push(4, b"m", None, copy=False, more=True)
    wire.queue.release()
    wire.queue.release()
    wire.finish()
    assert [kind for kind, _, _ in wire.frames] == list(range(5))


def test_frames_that_wait_for_more_are_dropped_with_the_connection() -> None:
    wire = Wire()
    wire.queue.attach(wire.near)
    wire.queue.push(1, b"m", None, copy=False, more=True)
    wire.queue.detach()
    wire.queue.release()
    assert wire.queue.queued_bytes == 0
    assert wire.queue.push(2, b"m", None, copy=False, more=True)  # somebody has to dial
    wire.near.close()
    wire.far.close()


def test_small_frames_that_wait_go_in_one_write() -> None:
    wire = Wire()
    for number in range(30):
        wire.queue.push(number, b"m", None, copy=False)
    wire.queue.attach(wire.near)
    assert wire.armed
    wire.write()
    assert not wire.armed
    wire.read()
    assert [kind for kind, _, _ in wire.frames] == list(range(30))
    wire.finish()


def test_the_backlog_limit_is_named_and_leaves_the_queue_whole() -> None:
    wire = Wire(limit_bytes=1000)
    wire.queue.push(1, b"", memoryview(bytes(5000)), copy=False)  # an empty queue takes any frame
    with pytest.raises(LinkBacklog, match=r"5024 bytes wait for worker 7; a frame of 25 .* limit of 1000"):
        wire.queue.push(2, b"m", None, copy=False)
    assert wire.queue.queued_bytes == 5000 + HEADER_BYTES
    wire.queue.attach(wire.near)
    wire.write()
    wire.read()
    wire.queue.push(3, b"", None, copy=False)
    wire.finish()
    assert [kind for kind, _, _ in wire.frames] == [1, 3]


def test_detach_drops_what_waits_and_the_next_connection_starts_at_0() -> None:
    wire = Wire()
    wire.queue.attach(wire.near)
    wire.queue.push(1, b"", memoryview(bytes(100_000)), copy=False)
    assert wire.queue.queued_bytes
    wire.queue.detach()
    assert wire.queue.queued_bytes == 0
    assert wire.queue.push(2, b"", None, copy=False)
    wire.near.close()
    wire.far.close()
    wire.near, wire.far = socket.socketpair()
    wire.queue.attach(wire.near)
    assert wire.queue.write()
    head = wire.far.recv(HEADER_BYTES)
    assert struct.unpack("<IHHIIQ", head)[4] == 0
    wire.near.close()
    wire.far.close()


def test_a_broken_connection_does_not_raise_in_the_sender() -> None:
    wire = Wire()
    wire.queue.attach(wire.near)
    wire.far.close()
    assert not wire.queue.push(1, b"", None, copy=False)
    assert wire.armed  # the loop is told of the hang-up, and drops the frame
    with pytest.raises(OSError, match="pipe"):
        wire.queue.write()
    wire.near.close()


def test_a_closed_queue_tells_why() -> None:
    wire = Wire()
    assert wire.queue.close(LinkClosed("forgotten"))
    with pytest.raises(LinkClosed, match="forgotten"):
        wire.queue.push(1, b"", None, copy=False)
    wire.near.close()
    wire.far.close()


def test_a_payload_of_a_mebibyte_does_not_leave_a_rest_of_some_bytes_behind() -> None:
    """That would wait till the I/O thread has its turns again, milliseconds after the last wait of a caller."""
    near, far = socket.socketpair()
    with near, far:
        near.setblocking(False)
        options = LinkOptions()
        near.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, options.socket_buffer_bytes)
        queue = SendQueue("worker 7", direct_bytes=options.direct_bytes, limit_bytes=None, rearm=lambda *_: None)
        queue.attach(near)
        queue.push(1, bytes(20), memoryview(bytes(1 << 20)), copy=False)
        assert queue.queued_bytes == 0
