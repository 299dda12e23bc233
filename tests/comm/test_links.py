"""Links between workers of one process: what is promised holds over both transports."""

import gc
import os
import resource
import signal
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest
from links_harness import LIMIT_S, TOKEN, End, RawDialler, closed_reason, meet

from elaswave.comm import frames
from elaswave.comm.addresses import LinkOptions
from elaswave.comm.frames import encode_header
from elaswave.comm.hello import WELCOME_BYTES, encode_hello
from elaswave.comm.inbox import ConnectionRefused, Inbox, LinkItem, LinksFailed, PeerClosed, Received
from elaswave.comm.links import Links
from elaswave.comm.sending import LinkBacklog
from elaswave.core.ids import WorkerId
from elaswave.errors import ConfigError, InvariantError, LinkClosed, ProtocolError

KEEP_QUEUED = LinkOptions(socket_buffer_bytes=1 << 16, direct_bytes=0)


@pytest.fixture(params=["unix", "tcp"])
def addresses(request: pytest.FixtureRequest, tmp_path: Path) -> list[str]:
    """Where four workers may listen."""
    if request.param == "tcp":
        return ["tcp:127.0.0.1:0"] * 4
    return [f"unix:{tmp_path}/{number}" for number in range(4)]


@pytest.fixture
def pair(addresses: list[str]) -> Iterator[tuple[End, End]]:
    with End(0, addresses[0]) as one, End(1, addresses[1]) as other:
        meet(one, other)
        yield one, other


def noise(nbytes: int, seed: int = 0) -> np.ndarray[tuple[int], np.dtype[np.uint8]]:
    return np.random.default_rng(seed).integers(0, 256, nbytes, dtype=np.uint8)


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


def test_a_peer_that_comes_up_later_gets_what_was_sent(addresses: list[str], tmp_path: Path) -> None:
    with End(1, addresses[1]) as absent:
        later = absent.address  # for TCP: a port that is free again after this
    with End(0, addresses[0]) as one:
        one.links.set_addresses({WorkerId(1): later})
        for number in range(50):
            one.links.send(WorkerId(1), number, b"", noise(number * 1000, number))
        closed = closed_reason(one, 1)
        assert isinstance(closed.error, LinkClosed)
        assert "cannot reach worker 1" in closed.reason
        with End(1, later) as other:
            assert [frame.kind for frame in other.frames(50)] == list(range(50))
        assert one.links.statistics().failed_dials >= 1


def test_failed_dials_are_one_incident(addresses: list[str]) -> None:
    quick = LinkOptions(redial_first_s=0.001, redial_limit_s=0.001)
    with End(1, addresses[1]) as absent:
        gone = absent.address
    with End(0, addresses[0], options=quick) as one:
        one.links.set_addresses({WorkerId(1): gone})
        one.links.send(WorkerId(1), 1, b"")
        closed_reason(one, 1)
        deadline = time.monotonic() + LIMIT_S
        while one.links.statistics().failed_dials < 20:
            one.inbox.wait(min(deadline, time.monotonic() + 0.01))
            assert time.monotonic() < deadline
        assert one.nothing_of(PeerClosed)


def test_a_new_address_is_dialled_at_once(addresses: list[str]) -> None:
    slow = LinkOptions(redial_first_s=1000.0, redial_limit_s=1000.0)
    with End(1, addresses[1]) as absent:
        gone = absent.address
    with End(0, addresses[0], options=slow) as one, End(1, addresses[2]) as other:
        one.links.set_addresses({WorkerId(1): gone})
        one.links.send(WorkerId(1), 7, b"")
        closed_reason(one, 1)
        one.knows(other)
        assert other.next(Received).kind == 7


def test_a_wrong_token_is_refused_and_both_sides_are_told(addresses: list[str]) -> None:
    with End(0, addresses[0], token=b"guess") as intruder, End(1, addresses[1]) as other:
        intruder.knows(other).links.send(other.me, 1, b"secret", noise(100_000))
        refusal = other.next(ConnectionRefused)
        assert isinstance(refusal.error, ProtocolError)
        assert "worker 0 is not signed with this job's token" in str(refusal.error)
        closed = closed_reason(intruder, 1)
        assert isinstance(closed.error, ProtocolError)
        assert "our job token is not its token" in closed.reason
        assert intruder.links.queued_bytes() == 0
        assert other.nothing_of(Received)


def test_another_worker_at_the_address_is_noticed(addresses: list[str]) -> None:
    with End(0, addresses[0]) as one, End(1, addresses[1]) as other:
        one.links.set_addresses({WorkerId(5): other.address})
        one.links.send(WorkerId(5), 1, b"")
        assert "it is another worker" in closed_reason(one, 5).reason
        assert "out of date" in str(other.next(ConnectionRefused).error)


@pytest.mark.parametrize(
    ("head", "words"),
    [
        (b"\0" * 24, "starts with 0x00000000"),
        (encode_header(kind=1, meta_bytes=0, payload_bytes=0, sequence=5), "sequence 5 where 0 was due"),
        (encode_header(kind=1, meta_bytes=2**32 - 1, payload_bytes=0, sequence=0), "meta of 4294967295 bytes"),
        (encode_header(kind=1, meta_bytes=0, payload_bytes=2**63, sequence=0), f"payload of {2**63} bytes"),
        (encode_header(kind=1, meta_bytes=0, payload_bytes=0, sequence=0, flags=8), "unknown flags 0x0008"),
    ],
)
def test_a_malformed_frame_closes_its_link_only(
    pair: tuple[End, End], monkeypatch: pytest.MonkeyPatch, head: bytes, words: str
) -> None:
    one, other = pair
    with RawDialler(other.address) as raw:
        raw.join(9, 1)
        allocated: list[int] = []
        allocate = frames.aligned_buffer
        monkeypatch.setattr(frames, "aligned_buffer", lambda nbytes: (allocated.append(nbytes), allocate(nbytes))[1])
        raw.socket.sendall(head)
        closed = closed_reason(other, 9)
        assert isinstance(closed.error, ProtocolError)
        assert words in closed.reason
        assert raw.ended()
    assert allocated == []
    one.links.send(other.me, 3, b"still here")
    assert other.next(Received).meta == b"still here"
    assert other.nothing_of(PeerClosed)


def test_data_against_the_direction_of_a_link_is_refused(addresses: list[str]) -> None:
    """A listener that talks back on a connection that is the dialler's to use."""
    with End(0, addresses[0]) as one, End(1, addresses[1]) as other:
        meet(one, other)
        incoming = other.links._board._incoming[one.me]
        incoming._socket.send(b"not a good-bye")
        closed = closed_reason(one, 1)
        assert isinstance(closed.error, ProtocolError)
        assert "sent data on a connection that is not its to use" in closed.reason


def test_random_bytes_at_the_listener_change_nothing(pair: tuple[End, End]) -> None:
    one, other = pair
    rng = np.random.default_rng(5)
    for number in range(60):
        with RawDialler(other.address) as raw:
            if number % 3 == 0:
                raw.socket.sendall(rng.bytes(int(rng.integers(88, 3000))))
                assert raw.ended()
            elif number % 3 == 1:
                raw.socket.sendall(rng.bytes(int(rng.integers(1, 87))))  # and hang up within the hello
            else:
                raw.join(1000 + number, 1)
                raw.socket.sendall(rng.bytes(int(rng.integers(24, 3000))))
                assert isinstance(closed_reason(other, 1000 + number).error, ProtocolError)
    assert isinstance(other.next(ConnectionRefused).error, ProtocolError | LinkClosed)
    assert other.nothing_of(LinksFailed)
    one.links.send(other.me, 3, b"still here")
    assert other.next(Received).meta == b"still here"


def test_reports_of_refusals_are_rare(addresses: list[str]) -> None:
    with End(1, addresses[1]) as end:
        for _ in range(30):
            with RawDialler(end.address) as raw:
                raw.socket.sendall(bytes(88))
                assert raw.ended()
        end.next(ConnectionRefused)
        assert sum(isinstance(item, ConnectionRefused) for item in end.inbox.take_all()) < 29
        assert end.links.statistics().refusals == 30


def test_a_connection_without_a_hello_is_dropped(addresses: list[str]) -> None:
    with End(1, addresses[1], options=LinkOptions(hello_limit_s=0.05)) as end, RawDialler(end.address) as raw:
        assert raw.ended()
        assert "no hello within 0.05 s" in str(end.next(ConnectionRefused).error)


def test_a_listener_that_does_not_answer_is_given_up(tmp_path: Path) -> None:
    with (
        socket.socket(socket.AF_UNIX) as silent,
        End(0, f"unix:{tmp_path}/0", options=LinkOptions(hello_limit_s=0.05)) as one,
    ):
        silent.bind(f"{tmp_path}/silent")
        silent.listen()
        one.links.set_addresses({WorkerId(1): f"unix:{tmp_path}/silent"})
        one.links.send(WorkerId(1), 1, b"")
        assert "gave no answer within 0.05 s" in closed_reason(one, 1).reason
        assert one.links.queued_bytes(WorkerId(1)) == 25 - 1


def test_a_dial_under_way_is_given_up_for_a_new_address(addresses: list[str], tmp_path: Path) -> None:
    pause = LinkOptions(redial_first_s=0.05)
    with (
        socket.socket(socket.AF_UNIX) as silent,
        End(0, addresses[0], options=pause) as one,
        End(1, addresses[1]) as other,
    ):
        silent.bind(f"{tmp_path}/silent")
        silent.listen()
        silent.settimeout(LIMIT_S)
        one.links.set_addresses({other.me: f"unix:{tmp_path}/nobody"})
        one.links.send(other.me, 4, b"")
        closed_reason(one, 1)
        for _ in range(2):
            one.links.set_addresses({other.me: f"unix:{tmp_path}/silent"})
        dialled, _ = silent.accept()
        one.inbox.wait(time.monotonic() + 0.15)  # the pause after the failed dial ends in the middle of this one
        with dialled:
            one.knows(other)
            assert other.next(Received).kind == 4
            dialled.settimeout(LIMIT_S)
            assert dialled.recv(1) == b""
        silent.setblocking(False)
        with pytest.raises(BlockingIOError):
            silent.accept()


def test_out_of_descriptors_is_told_and_passes(addresses: list[str]) -> None:
    with End(1, addresses[1]) as end:
        family = socket.AF_UNIX if end.address.startswith("unix") else socket.AF_INET
        raws = [RawDialler.__new__(RawDialler) for _ in range(2)]
        for raw in raws:
            raw.socket = socket.socket(family)
            raw.socket.settimeout(LIMIT_S)
        target = end.address[5:] if family == socket.AF_UNIX else ("127.0.0.1", int(end.address.rpartition(":")[2]))
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))
        try:
            raws[0].socket.connect(target)
            told = end.next(ConnectionRefused)
            assert not end.inbox.wait(time.monotonic() + 0.3)
            assert end.links.statistics().refusals < 10  # it pauses, else it would be thousands
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        assert "Too many open files" in str(told.error)
        raws[0].join(9, 1)  # the same connection, once there are descriptors again
        for raw in raws:
            raw.socket.close()


def test_good_bye_is_told_apart(pair: tuple[End, End]) -> None:
    one, other = pair
    other.links.send(one.me, 1, b"last")
    assert other.links.close(LIMIT_S)
    assert one.next(Received).meta == b"last"
    closed = closed_reason(one, 1)
    assert closed.orderly
    assert "said good-bye" in closed.reason
    assert one.nothing_of(PeerClosed)


def test_forget_closes_both_ways_and_drops_what_waits(pair: tuple[End, End]) -> None:
    one, other = pair
    one.links.forget(other.me)
    assert closed_reason(other, 0).orderly
    with pytest.raises(LinkClosed, match="worker 1: it has no address here"):
        one.links.send(other.me, 1, b"")
    assert one.nothing_of(PeerClosed)
    # The forgotten one may still tell what it knows, and may be let in again.
    other.links.send(one.me, 2, b"from the forgotten")
    assert one.next(Received).meta == b"from the forgotten"
    one.knows(other).links.send(other.me, 3, b"let in again")
    assert other.next(Received).meta == b"let in again"
    assert other.nothing_of(PeerClosed)


def test_after_forget_nothing_is_reported(pair: tuple[End, End]) -> None:
    """The peer's hang-up is there already, but not seen, when it is forgotten."""
    one, other = pair
    for end in pair:
        assert end.links._board.loop.lead()
    other.links._board._incoming[one.me]._socket.shutdown(socket.SHUT_RDWR)
    one.links.forget(other.me)
    for end in pair:
        end.links._board.loop.follow()
    closed_reason(other, 0)
    one.knows(other).links.send(other.me, 1, b"")
    other.next(Received)
    assert one.nothing_of(PeerClosed)


def test_forget_keeps_what_was_received(pair: tuple[End, End]) -> None:
    one, other = pair
    for number in range(10):
        other.links.send(one.me, number, b"")
    one.seen = one.frames(10)
    one.links.forget(other.me)
    assert [frame.kind for frame in one.frames(10)] == list(range(10))


def test_forget_while_dialling_drops_the_frames(addresses: list[str]) -> None:
    with End(1, addresses[1]) as absent:
        gone = absent.address
    with End(0, addresses[0]) as one:
        one.links.set_addresses({WorkerId(1): gone})
        one.links.send(WorkerId(1), 1, b"", noise(1000))
        closed_reason(one, 1)
        assert one.links.queued_bytes() == one.links.queued_bytes(WorkerId(1)) == 1024
        one.links.forget(WorkerId(1))
        assert one.links.queued_bytes() == 0
        with End(1, gone) as other:
            one.knows(other).links.send(WorkerId(1), 2, b"")
            assert other.next(Received).kind == 2


def test_who_dials_anew_is_reported_and_its_frames_stay_in_order(addresses: list[str]) -> None:
    """The second hello is seen before the last frames of the first connection, which still looks alive."""
    with End(1, addresses[1]) as end, RawDialler(end.address) as first, RawDialler(end.address) as second:
        first.join(9, 1)
        ends = second.challenged(9, 1)
        assert end.links._board.loop.lead()  # nothing is read until all has come, the hello first
        second.socket.sendall(encode_hello(ends))
        for number in range(5):
            head = encode_header(kind=number, meta_bytes=0, payload_bytes=9000, sequence=number)
            first.socket.sendall(head + bytes(9000))
        end.links._board.loop.follow()
        second.read(WELCOME_BYTES)
        second.socket.sendall(encode_header(kind=5, meta_bytes=0, payload_bytes=0, sequence=0))
        items: list[LinkItem] = []
        while len(items) < 7:
            assert end.inbox.wait(time.monotonic() + LIMIT_S), items
            items += end.inbox.take_all()
        assert [item.kind for item in items if isinstance(item, Received)] == list(range(6))
        assert isinstance(items[5], PeerClosed)
        assert "dialled anew" in items[5].reason
        assert first.ended()


def test_what_a_peer_sent_before_its_death_is_received_before_the_report(pair: tuple[End, End]) -> None:
    """The hang-up of our connection to it is seen before the last frames on its connection to us."""
    one, other = pair
    for end in pair:
        assert end.links._board.loop.lead()
    incoming = other.links._board._incoming[one.me]
    incoming._socket.shutdown(socket.SHUT_RDWR)
    for number in range(5):
        other.links.send(one.me, number, b"", noise(9000))
    for end in pair:
        end.links._board.loop.follow()
    items: list[LinkItem] = []
    while not items or not isinstance(items[-1], PeerClosed):
        assert one.inbox.wait(time.monotonic() + LIMIT_S), items
        items += one.inbox.take_all()
    assert [item.kind for item in items[:-1] if isinstance(item, Received)] == list(range(5))


def test_what_was_sent_before_a_hang_up_is_received_before_its_report(addresses: list[str]) -> None:
    with End(1, addresses[1]) as end, RawDialler(end.address) as raw:
        raw.join(9, 1)
        head = encode_header(kind=1, meta_bytes=0, payload_bytes=300_000, sequence=0)
        raw.socket.sendall(head + bytes(300_000) + b"KEWL")
        raw.socket.close()
        closed = closed_reason(end, 9)
        assert [item.payload.size for item in end.seen if isinstance(item, Received)] == [300_000]
        assert "in the middle of a frame" in closed.reason
        assert not closed.orderly


def test_a_break_in_one_direction_takes_down_both_once(pair: tuple[End, End]) -> None:
    one, other = pair
    other.links._board._incoming[one.me]._socket.shutdown(2)
    for end, peer in ((one, 1), (other, 0)):
        closed_reason(end, peer)
    meet(one, other)
    for end in pair:
        assert end.nothing_of(PeerClosed)
        assert end.links.statistics().incidents == 1


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


def test_many_meetings_leave_nothing_behind(addresses: list[str]) -> None:
    with End(0, addresses[0]) as one, End(1, addresses[1]) as other:
        process = psutil.Process()
        meet(one, other)
        before = None
        for number in range(200):
            one.knows(other).links.send(other.me, 1, b"", noise(100))
            assert other.next(Received).kind == 1
            if number % 2:
                other.links.send(one.me, 2, b"")
                one.next(Received)
            one.links.forget(other.me)
            closed_reason(other, 0)
            if before is None:
                before = (process.num_fds(), threading.active_count())
        assert process.num_fds() <= before[0] + 2
        assert threading.active_count() == before[1]
        assert one.links.queued_bytes() == other.links.queued_bytes() == 0
        assert len(other.links._board._incoming) == 0
        assert len(one.links._board._outgoing) == 0


def test_close_leaves_nothing_behind(addresses: list[str], tmp_path: Path) -> None:
    gc.collect()
    process = psutil.Process()
    before = (process.num_fds(), threading.active_count())
    for _ in range(20):
        with End(0, addresses[0]) as one, End(1, addresses[1]) as other:
            meet(one, other)
            with RawDialler(one.address):
                pass
    assert (process.num_fds(), threading.active_count()) == before
    assert list(tmp_path.iterdir()) == []


def test_close_without_start_and_twice(addresses: list[str], tmp_path: Path) -> None:
    before = psutil.Process().num_fds()
    inbox: Inbox[LinkItem] = Inbox()
    links = Links(WorkerId(0), TOKEN, inbox, payload_limit_bytes=1)
    links.listen(addresses[0])
    assert links.close(0.0)
    assert links.close(0.0)
    assert psutil.Process().num_fds() == before
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(InvariantError):
        links.start()


def test_after_close_sending_is_an_error(pair: tuple[End, End]) -> None:
    one, other = pair
    one.links.close(0.0)
    with pytest.raises(LinkClosed, match="closed"):
        one.links.send(other.me, 1, b"")


def test_a_bug_inside_is_reported_and_ends_the_links(pair: tuple[End, End]) -> None:
    one, other = pair

    def bug() -> None:
        raise ZeroDivisionError("planted")

    one.links._board.loop.call_soon(bug)
    failed = one.next(LinksFailed)
    assert "planted" in str(failed.error)
    assert not closed_reason(other, 0).orderly
    deadline = time.monotonic() + LIMIT_S
    while one.links._board.loop.lead():  # until the thread has closed all
        one.links._board.loop.follow()
        assert time.monotonic() < deadline
    with pytest.raises(InvariantError, match="planted"):
        one.links.send(other.me, 1, b"")
    with pytest.raises(InvariantError, match="planted"):
        one.links.flush(time.monotonic())


def test_signals_are_left_to_the_main_thread(pair: tuple[End, End]) -> None:
    blocked = [
        int(line.split()[1], 16)
        for thread in threading.enumerate()
        if thread.name == "elaswave-links"
        for line in Path(f"/proc/self/task/{thread.native_id}/status").read_text().splitlines()
        if line.startswith("SigBlk:")
    ]
    assert len(blocked) == 2
    assert all(mask >> (signal.SIGTERM - 1) & 1 and mask >> (signal.SIGINT - 1) & 1 for mask in blocked)


def test_construction_opens_nothing_and_checks_its_arguments() -> None:
    before = (psutil.Process().num_fds(), threading.active_count())
    inbox: Inbox[LinkItem] = Inbox()
    Links(WorkerId(0), TOKEN, inbox, payload_limit_bytes=1)
    assert (psutil.Process().num_fds(), threading.active_count()) == before
    with pytest.raises(ConfigError, match="token is empty"):
        Links(WorkerId(0), b"", inbox, payload_limit_bytes=1)
    with pytest.raises(ConfigError, match="worker id -1"):
        Links(WorkerId(-1), TOKEN, inbox, payload_limit_bytes=1)
    with pytest.raises(ConfigError, match="payload limit of -1"):
        Links(WorkerId(0), TOKEN, inbox, payload_limit_bytes=-1)


def test_an_address_that_cannot_be_read_sets_none(pair: tuple[End, End]) -> None:
    one, _ = pair
    with pytest.raises(ConfigError):
        one.links.set_addresses({WorkerId(5): "unix:/x", WorkerId(6): "nowhere"})
    with pytest.raises(LinkClosed):
        one.links.send(WorkerId(5), 1, b"")
    with pytest.raises(LinkClosed):
        one.links.send(one.me, 1, b"")


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
