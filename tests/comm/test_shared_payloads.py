"""Payloads in shared memory: who may use a block anew and when, what descriptors are refused, real processes."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from links_harness import LIMIT_S, End, meet, noise

from elaswave.comm.addresses import LinkOptions
from elaswave.comm.inbox import PeerClosed, Received
from elaswave.comm.shared_payloads import DESCRIPTOR, FLAGS, SETTLE_TRIES, PayloadPool, PeerMemory
from elaswave.core.ids import WorkerId
from elaswave.errors import LinkClosed, ProtocolError

PEER = WorkerId(1)
SHARED = LinkOptions(shared_memory=True)
MANY = 1 << 30


@pytest.fixture
def pool() -> Iterator[PayloadPool]:
    found = PayloadPool()
    yield found
    found.close()


@pytest.fixture
def borrower() -> PeerMemory:
    return PeerMemory(os.getpid())


def address(found: np.ndarray | None) -> int:
    assert found is not None
    return int(found.ctypes.data)


def places(pool: PayloadPool, nbytes: int, count: int = 4) -> set[int]:
    """Where the next blocks of that size lie: more than are free."""
    taken = [pool.take(nbytes) for _ in range(count)]
    return {address(found) for found in taken}


def lent(pool: PayloadPool, array: np.ndarray, *, copy: bool = False) -> bytes:
    found = pool.lend(array.data, PEER, copy=copy)
    assert found is not None
    return found


def test_memory_is_aligned_and_used_again_when_its_last_view_is_gone(pool: PayloadPool) -> None:
    first = pool.take(5000)
    place = address(first)
    assert place % 64 == 0
    assert first is not None
    part = first[100:200].view(np.uint16)
    del first
    assert place not in places(pool, 5000)
    del part
    assert place in places(pool, 5000, 12)


def test_a_borrowed_payload_is_read_in_place_and_keeps_its_block(pool: PayloadPool, borrower: PeerMemory) -> None:
    mine = pool.take(100_000)
    assert mine is not None
    mine[:] = noise(100_000)
    place = address(mine)
    theirs = borrower.borrow(lent(pool, mine[64:]), MANY)
    assert np.array_equal(theirs, mine[64:])
    mine[64] ^= 255
    assert theirs[0] == mine[64]
    del mine
    assert place not in places(pool, 100_000)
    part = theirs[5:6]
    del theirs
    assert place not in places(pool, 100_000)
    del part
    assert place in places(pool, 100_000, 12)


def test_other_memory_and_copies_are_lent_from_a_block_of_their_own(pool: PayloadPool, borrower: PeerMemory) -> None:
    elsewhere = noise(20_000)
    assert np.array_equal(borrower.borrow(lent(pool, elsewhere), MANY), elsewhere)
    mine = pool.take(20_000)
    assert mine is not None
    mine[:] = 7
    theirs = borrower.borrow(lent(pool, mine, copy=True), MANY)
    mine[:] = 8
    assert (theirs == 7).all()


def test_a_block_without_a_flag_left_is_copied(pool: PayloadPool, borrower: PeerMemory) -> None:
    mine = pool.take(4096)
    assert mine is not None
    mine[:] = noise(4096)
    found = [lent(pool, mine) for _ in range(FLAGS + 1)]
    starts = [DESCRIPTOR.unpack(place)[4] for place in found]
    assert len(set(starts[:-1])) == 1
    assert starts[-1] != starts[0]
    assert np.array_equal(borrower.borrow(found[-1], MANY), mine)


def test_what_a_peer_had_borrowed_is_free_only_when_its_process_has_ended(pool: PayloadPool) -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        pool.connected(PEER, process.pid)
        mine = pool.take(50_000)
        place = address(mine)
        assert mine is not None
        lent(pool, mine)
        del mine
        process.send_signal(signal.SIGSTOP)
        assert place not in places(pool, 50_000)
        process.kill()
        process.wait(LIMIT_S)
        assert place in places(pool, 50_000, 12)


def test_old_memory_is_found_behind_what_peers_still_read(pool: PayloadPool, borrower: PeerMemory) -> None:
    arrays = [pool.take(5000) for _ in range(3 * SETTLE_TRIES)]
    old = {address(array) for array in arrays[:2]}
    read = [borrower.borrow(lent(pool, array), MANY) for array in arrays[2:] if array is not None]
    while arrays:
        del arrays[0]  # in their order, so that those that nobody reads were given back first
    first, second = pool.take(5000), pool.take(5000)
    assert {address(first), address(second)} == old
    assert len(read) == 3 * SETTLE_TRIES - 2


def test_after_the_end_nothing_is_lent(pool: PayloadPool) -> None:
    mine = pool.take(4096)
    assert mine is not None
    pool.close()
    assert pool.take(1) is None
    assert pool.lend(mine.data, PEER) is None


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"length": 1 << 40}, "over the limit"),
        ({"start": 1 << 62}, "does not lie"),
        ({"start": 0}, "does not lie"),
        ({"flag": FLAGS}, "does not lie"),
        ({"block": 1 << 62, "start": (1 << 62) + 64}, "does not lie"),
        ({"segment_bytes": 4096, "length": 0}, "must be sealed memory of 4096"),
        ({"file": 0}, "cannot be opened|must be sealed|of a peer has"),
        ({"file": 1 << 31}, "cannot be opened"),
    ],
)
def test_a_descriptor_that_points_elsewhere_is_refused(
    pool: PayloadPool, borrower: PeerMemory, fields: dict[str, int], reason: str
) -> None:
    names = ("file", "flag", "segment_bytes", "block", "start", "length")
    good = dict(zip(names, DESCRIPTOR.unpack(lent(pool, noise(20_000))), strict=True))
    with pytest.raises((ProtocolError, LinkClosed), match=reason):
        borrower.borrow(DESCRIPTOR.pack(*(good | fields).values()), MANY)


def test_a_descriptor_of_another_length_and_a_file_that_is_no_sealed_memory_are_refused(
    borrower: PeerMemory, tmp_path: Path
) -> None:
    with pytest.raises(ProtocolError, match="described by 3 bytes"):
        borrower.borrow(b"abc", MANY)
    plain = tmp_path / "plain"
    plain.write_bytes(bytes(8192))
    with plain.open("r+b") as opened, pytest.raises((ProtocolError, LinkClosed)):
        borrower.borrow(DESCRIPTOR.pack(opened.fileno(), 0, 8192, 0, 64, 1), MANY)


def test_a_peer_whose_process_cannot_be_watched_keeps_what_it_has_borrowed(pool: PayloadPool) -> None:
    pool.connected(PEER, 0)  # what the kernel says of a process of another PID namespace
    mine = pool.take(50_000)
    place = address(mine)
    assert mine is not None
    lent(pool, mine)
    del mine
    assert place not in places(pool, 50_000)


def test_links_of_one_host_share_payloads_and_small_ones_stay_in_the_frame(tmp_path: Path) -> None:
    with End(0, f"unix:{tmp_path}/0", options=SHARED) as one, End(1, f"unix:{tmp_path}/1", options=SHARED) as other:
        meet(one, other)
        payload = one.links.memory(1 << 20)
        payload[:] = noise(1 << 20)
        one.links.send(other.me, 1, b"large", payload)
        one.links.send(other.me, 2, b"small", payload[:100])
        large, small = other.frames(2)
        assert (large.meta, small.meta) == (b"large", b"small")
        assert np.array_equal(large.payload, payload)
        payload[0] ^= 255
        assert large.payload[0] == payload[0]
        assert np.array_equal(small.payload[1:], payload[1:100])
        assert small.payload[0] != payload[0]
        assert not large.payload.ctypes.data % 64


def test_links_over_tcp_do_not_share(tmp_path: Path) -> None:
    with End(0, "tcp:127.0.0.1:0", options=SHARED) as one, End(1, "tcp:127.0.0.1:0", options=SHARED) as other:
        meet(one, other)
        payload = one.links.memory(1 << 20)
        payload[:] = 1
        one.links.send(other.me, 1, b"", payload)
        (found,) = other.frames(1)
        payload[:] = 2
        assert (found.payload == 1).all()


def test_a_shared_frame_where_memory_is_not_shared_closes_the_link(tmp_path: Path) -> None:
    with End(0, f"unix:{tmp_path}/0", options=SHARED) as one, End(1, f"unix:{tmp_path}/1") as other:
        meet(one, other)
        one.links.send(other.me, 1, b"", noise(1 << 20))
        closed = other.next(PeerClosed)
        assert isinstance(closed.error, ProtocolError)
        assert "unknown flags" in closed.reason


SENDER = """
import os, signal, sys, time
import numpy as np
from elaswave.comm.addresses import LinkOptions
from elaswave.comm.inbox import Inbox
from elaswave.comm.links import Links
inbox = Inbox()
links = Links(1, b"the token of this job", inbox, payload_limit_bytes=64 << 20, options=LinkOptions(shared_memory=True))
links.listen(sys.argv[2])
links.start()
links.set_addresses({0: sys.argv[1]})
payload = links.memory(1 << 20)
payload[:] = 5
links.send(0, 1, b"first", payload)
inbox.wait(time.monotonic() + 60)
links.send(0, 1, b"second", payload)
links.flush(time.monotonic() + 60)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_payloads_outlive_the_process_that_sent_them(tmp_path: Path) -> None:
    with End(0, f"unix:{tmp_path}/0", options=SHARED) as end:
        theirs = f"unix:{tmp_path}/1"
        with subprocess.Popen([sys.executable, "-c", SENDER, end.address, theirs]) as process:
            first = end.next(Received)
            end.links.set_addresses({WorkerId(1): theirs})
            end.links.send(WorkerId(1), 1, b"go on")
            second = end.next(Received)
            assert end.next(PeerClosed).peer == 1
            assert process.wait(LIMIT_S) == -signal.SIGKILL
        assert (first.payload == 5).all()
        assert (second.payload == 5).all()


def test_segments_cannot_shrink_under_who_reads_them(pool: PayloadPool) -> None:
    file = DESCRIPTOR.unpack(lent(pool, noise(20_000)))[0]
    with pytest.raises(PermissionError):
        os.ftruncate(file, 4096)
