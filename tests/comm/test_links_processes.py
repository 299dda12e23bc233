"""Links between real processes: bytes, kills, stops."""

import signal
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
from links_harness import LIMIT_S, STOP_KIND, Echo, End, closed_reason

from elaswave.comm.addresses import LinkOptions
from elaswave.comm.inbox import PeerClosed, Received
from elaswave.errors import LinkClosed


def know_each_other(end: End, echo: Echo) -> None:
    end.knows(echo)
    echo.knows(end)
    end.links.send(echo.me, 1, b"hello")
    assert end.next(Received).meta == b"hello"


def test_bytes_of_all_sizes_come_back(addresses: list[str]) -> None:
    rng = np.random.default_rng(0)
    sizes = [0, 1, 100, 4096, 65_536, 1 << 20, 16 << 20, 33 << 20, 64 << 20, 5]
    with End(0, addresses[0]) as end, Echo(1, addresses[1]) as echo:
        know_each_other(end, echo)
        payloads = [rng.integers(0, 256, size, dtype=np.uint8) for size in sizes]
        for number, payload in enumerate(payloads):
            end.links.send(echo.me, number, str(number).encode(), payload)
        for number, payload in enumerate(payloads):
            frame = end.next(Received)
            assert (frame.kind, frame.meta) == (number, str(number).encode())
            assert frame.payload.size == 0 or frame.payload.ctypes.data % 64 == 0
            assert np.array_equal(frame.payload, payload)


def test_a_thousand_small_frames_keep_their_order(addresses: list[str]) -> None:
    with End(0, addresses[0]) as end, Echo(1, addresses[1]) as echo:
        know_each_other(end, echo)
        for number in range(1000):
            end.links.send(echo.me, number, number.to_bytes(4, "little"), bytes(number))
        for number in range(1000):
            frame = end.next(Received)
            assert (frame.kind, int.from_bytes(frame.meta, "little"), frame.payload.size) == (number, number, number)


@pytest.mark.parametrize("waiting", [True, False])
def test_a_killed_peer_is_reported_at_once_and_once(addresses: list[str], waiting: bool) -> None:
    with End(0, addresses[0]) as end, Echo(1, addresses[1]) as echo:
        know_each_other(end, echo)
        start = time.monotonic()
        echo.signal(signal.SIGKILL)
        if not waiting:
            echo.process.wait(LIMIT_S)
        closed = closed_reason(end, 1)
        assert time.monotonic() - start < 2.0
        assert isinstance(closed.error, LinkClosed)
        assert not closed.orderly
        end.links.send(echo.me, 1, b"to the dead")
        end.inbox.wait(time.monotonic() + 0.1)
        assert end.nothing_of(PeerClosed)
        assert end.links.statistics().incidents == 1


def test_a_peer_killed_in_the_middle_of_large_frames_loses_only_those(addresses: list[str]) -> None:
    with End(0, addresses[0]) as end, Echo(1, addresses[1]) as echo:
        know_each_other(end, echo)
        payload = np.ones(64 << 20, dtype=np.uint8)
        for _ in range(4):
            end.links.send(echo.me, 2, b"", payload)
        end.next(Received)
        echo.signal(signal.SIGKILL)
        closed_reason(end, 1)
        assert end.links.queued_bytes(echo.me) == 0
        assert all(item.payload.size == payload.size for item in end.seen if isinstance(item, Received))


def test_a_stopped_peer_does_not_hold_up_the_sender(addresses: list[str]) -> None:
    with End(0, addresses[0]) as end, Echo(1, addresses[1]) as echo:
        know_each_other(end, echo)
        echo.signal(signal.SIGSTOP)
        echo.wait_stopped()
        payload = np.arange(8 << 20, dtype=np.uint8)
        slowest = 0.0
        for number in range(8):
            start = time.monotonic()
            end.links.send(echo.me, number, b"", payload)
            slowest = max(slowest, time.monotonic() - start)
        assert slowest < 1.0
        assert not end.links.flush(time.monotonic() + 0.05)
        assert end.links.queued_bytes(echo.me) > 50 << 20
        echo.signal(signal.SIGCONT)
        for number in range(8):
            frame = end.next(Received)
            assert frame.kind == number
            assert np.array_equal(frame.payload, payload)
        assert end.links.flush(time.monotonic() + LIMIT_S)


def test_a_stopped_peer_over_tcp_ends_in_an_error_within_the_user_timeout() -> None:
    options = LinkOptions(user_timeout_s=0.5)
    with End(0, "tcp:127.0.0.1:0", options=options) as end, Echo(1, "tcp:127.0.0.1:0") as echo:
        know_each_other(end, echo)
        echo.signal(signal.SIGSTOP)
        echo.wait_stopped()
        end.links.send(echo.me, 1, b"", np.zeros(32 << 20, dtype=np.uint8))
        start = time.monotonic()
        closed = closed_reason(end, 1)
        assert time.monotonic() - start < 10.0
        assert "timed out" in closed.reason.lower()


def test_an_ordered_end_is_told_apart_from_a_death(addresses: list[str]) -> None:
    with End(0, addresses[0]) as end, Echo(1, addresses[1]) as echo:
        know_each_other(end, echo)
        end.links.send(echo.me, STOP_KIND, b"")
        assert closed_reason(end, 1).orderly
        assert echo.process.wait(LIMIT_S) == 0


def sleeps(pid: int) -> int:
    """How often the threads of a process have gone to sleep so far."""
    texts = [path.read_text() for path in Path(f"/proc/{pid}/task").glob("*/status")]
    assert len(texts) >= 2
    lines = [line for text in texts for line in text.splitlines() if line.startswith("voluntary_ctxt_switches:")]
    return sum(int(line.split()[1]) for line in lines)


def test_an_idle_link_costs_no_time(addresses: list[str]) -> None:
    """Nothing polls and nothing spins, in the thread that waits or in the one that does not."""
    with End(0, addresses[0]) as end, Echo(1, addresses[1]) as echo:
        know_each_other(end, echo)
        before = sleeps(echo.process.pid)
        assert not end.inbox.wait(time.monotonic() + 0.5)
        assert sleeps(echo.process.pid) - before <= 8
        busy = psutil.Process(echo.process.pid).cpu_times()
        assert not end.inbox.wait(time.monotonic() + 0.5)
        later = psutil.Process(echo.process.pid).cpu_times()
        assert later.user + later.system - busy.user - busy.system < 0.1
