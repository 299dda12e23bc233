"""Dialling and listening: who gets in, who is refused and how both sides learn of it, what garbage does."""

import resource
import socket
import time
from pathlib import Path

import numpy as np
import pytest
from links_harness import LIMIT_S, End, RawDialler, closed_reason, meet, noise

from elaswave.comm import frames
from elaswave.comm.addresses import LinkOptions
from elaswave.comm.frames import encode_header
from elaswave.comm.inbox import ConnectionRefused, LinksFailed, PeerClosed, Received
from elaswave.core.ids import WorkerId
from elaswave.errors import ConfigError, LinkClosed, ProtocolError


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


def test_an_address_that_cannot_be_read_sets_none(pair: tuple[End, End]) -> None:
    one, _ = pair
    with pytest.raises(ConfigError):
        one.links.set_addresses({WorkerId(5): "unix:/x", WorkerId(6): "nowhere"})
    with pytest.raises(LinkClosed):
        one.links.send(WorkerId(5), 1, b"")
    with pytest.raises(LinkClosed):
        one.links.send(one.me, 1, b"")
