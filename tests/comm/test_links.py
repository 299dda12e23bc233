"""Links between workers of one process: what is sent arrives, within the limits, over both transports."""

import os
import time

import numpy as np
import pytest
from links_harness import LIMIT_S, End, closed_reason, meet, noise

from elaswave.comm.addresses import LinkOptions
from elaswave.comm.inbox import Received
from elaswave.comm.sending import LinkBacklog
from elaswave.core.ids import WorkerId
from elaswave.errors import InvariantError, ProtocolError

KEEP_QUEUED = LinkOptions(socket_buffer_bytes=1 << 16, direct_bytes=0)


def test_frames_of_many_sizes_arrive_whole_and_in_order(pair: tuple[End, End]) -> None:
    one, other = pair
    sizes = [0, 1, 63, 64, 4072, 4096, 32743, 32744, 32745, 100_000, 0, 1 << 20, 7, 5_000_001, 3]
    for number, size in enumerate(sizes):
        one.links.send(other.me, number, bytes([number]) * (size % 5000), noise(size, number))
        other.links.send(one.me, number, b"back", noise(size, number))
    for number, size in enumerate(sizes):
        frame = other.next(Received)
        assert (frame.peer, frame.kind, frame.meta) == (one.me, number, bytes([number]) * (size % 5000))
        assert np.array_equal(frame.payload, noise(size, number))
        assert frame.payload.ctypes.data % 64 == 0 or not size
        assert np.array_equal(one.next(Received).payload, noise(size, number))


def test_meta_of_the_largest_size_passes(pair: tuple[End, End]) -> None:
    one, other = pair
    one.links.send(other.me, 1, bytes(1 << 20))
    assert len(other.next(Received).meta) == 1 << 20
    with pytest.raises(ProtocolError, match="1048577 bytes is over the limit of 1048576"):
        one.links.send(other.me, 1, bytes((1 << 20) + 1))


def test_any_contiguous_buffer_is_a_payload(pair: tuple[End, End]) -> None:
    one, other = pair
    numbers = np.arange(6, dtype=np.float32).reshape(2, 3)
    for payload in (numbers.tobytes(), bytearray(numbers.tobytes()), memoryview(numbers), numbers.view(np.uint8)):
        one.links.send(other.me, 1, b"", payload)
        assert other.next(Received).payload.view(np.float32).tolist() == [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]
    with pytest.raises(InvariantError, match="not contiguous"):
        one.links.send(other.me, 1, b"", noise(100)[::2])
    with pytest.raises(ProtocolError, match="kind 65536"):
        one.links.send(other.me, 65536, b"")


def test_a_payload_may_change_once_it_is_sent(addresses: list[str]) -> None:
    """Referred to until flushed, or copied where it has to wait."""
    with End(0, addresses[0], options=KEEP_QUEUED) as one, End(1, addresses[1]) as other:
        one.knows(other)
        payload = noise(3_000_000)
        expected = payload.copy()
        one.links.send(other.me, 1, b"", payload, copy=True)
        payload[:] = 0
        one.links.send(other.me, 2, b"", payload)
        assert one.links.flush(time.monotonic() + LIMIT_S)
        assert one.links.queued_bytes(other.me) == 0
        payload[:] = 1
        assert np.array_equal(other.next(Received).payload, expected)
        assert not other.next(Received).payload.any()


def test_flush_ends_at_its_deadline(addresses: list[str]) -> None:
    with End(1, addresses[1]) as absent:
        gone = absent.address
    with End(0, addresses[0]) as one:
        one.links.set_addresses({WorkerId(1): gone})
        assert one.links.flush(time.monotonic())
        one.links.send(WorkerId(1), 1, b"")
        start = time.monotonic()
        assert not one.links.flush(start + 0.05)
        assert time.monotonic() - start >= 0.05
        assert not one.links.close(0.05)


def test_the_backlog_limit_is_an_error_of_the_sender(addresses: list[str]) -> None:
    with End(1, addresses[1]) as absent:
        gone = absent.address
    with End(0, addresses[0], options=LinkOptions(queue_limit_bytes=10_000)) as one:
        one.links.set_addresses({WorkerId(1): gone})
        one.links.send(WorkerId(1), 1, b"", noise(20_000))
        with pytest.raises(LinkBacklog, match=r"20024 bytes wait for worker 1.*limit of 10000"):
            one.links.send(WorkerId(1), 2, b"")
        with End(1, gone) as other:
            assert other.next(Received).payload.size == 20_000


def test_limits_of_payloads_hold_on_both_sides(addresses: list[str]) -> None:
    with End(0, addresses[0]) as one, End(1, addresses[1], payload_limit_bytes=1000) as small:
        meet(one, small)
        with pytest.raises(ProtocolError, match="payload of 1001 bytes is over the limit of 1000"):
            small.links.send(one.me, 1, b"", noise(1001))
        one.links.send(small.me, 1, b"", noise(1000))
        assert small.next(Received).payload.size == 1000
        one.links.send(small.me, 1, b"", noise(1001))
        assert isinstance(closed_reason(small, 0).error, ProtocolError)
        closed_reason(one, 1)


def test_statistics_count_by_kind(pair: tuple[End, End]) -> None:
    one, other = pair
    for _ in range(3):
        one.links.send(other.me, 7, b"abc", noise(1000))
    other.frames(3)
    sent = {row.kind: (row.frames, row.bytes) for row in one.links.statistics().sent}
    received = {row.kind: (row.frames, row.bytes) for row in other.links.statistics().received}
    assert sent[7] == received[7] == (3, 3 * 1027)
    assert (one.links.statistics().dials, one.links.statistics().accepted) == (1, 1)


def test_a_busy_consumer_is_served_by_the_thread(addresses: list[str]) -> None:
    """Frames beyond all socket buffers arrive while nobody waits at the inbox, whoever did before."""
    with End(0, addresses[0]) as one, End(1, addresses[1]) as other:
        meet(one, other)
        one.knows(other).links.send(other.me, 1, b"", noise(20_000_000))
        assert one.links.flush(time.monotonic() + LIMIT_S)
        deadline = time.monotonic() + LIMIT_S
        while not other.inbox._queue.qsize():
            os.sched_yield()
            assert time.monotonic() < deadline
        assert other.next(Received).payload.size == 20_000_000
