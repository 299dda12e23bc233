"""Breaks, good-byes and ends: reported once, nothing lost without a report, nothing left behind."""

import gc
import signal
import socket
import threading
import time
from pathlib import Path

import psutil
import pytest
from links_harness import LIMIT_S, TOKEN, End, RawDialler, closed_reason, meet, noise

from elaswave.comm.frames import encode_header
from elaswave.comm.hello import WELCOME_BYTES, encode_hello
from elaswave.comm.inbox import Inbox, LinkItem, LinksFailed, PeerClosed, Received
from elaswave.comm.links import Links
from elaswave.core.ids import WorkerId
from elaswave.errors import ConfigError, InvariantError, LinkClosed


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


def test_many_meetings_leave_nothing_behind(addresses: list[str]) -> None:
    with End(0, addresses[0]) as one, End(1, addresses[1]) as other:
        process = psutil.Process()
        meet(one, other)
        before = None
        for number in range(100):
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
