"""The loop: commands, timers and sockets are served whoever runs the turns; a bug in a handler is reported."""

import select
import socket
import threading
import time
from collections.abc import Callable, Iterator
from queue import SimpleQueue

import pytest

from elaswave.comm.loop import BUSY_S, PATIENCE, Consumer, Loop

LIMIT_S = 20.0


class Reader:
    def __init__(self, opened: socket.socket, read: SimpleQueue[bytes]) -> None:
        self.opened = opened
        self._read = read

    def on_event(self, events: int) -> None:
        self._read.put(self.opened.recv(100))


@pytest.fixture
def loop() -> Iterator[Loop]:
    failures: list[Exception] = []
    made = Loop(on_failure=failures.append, on_end=lambda: None)
    made.start()
    yield made
    assert made.stop(LIMIT_S)
    assert failures == []


def test_commands_before_the_start_are_run(loop: Loop) -> None:
    done: SimpleQueue[int] = SimpleQueue()
    other = Loop(on_failure=lambda error: None, on_end=lambda: done.put(2))
    other.call_soon(lambda: done.put(1))
    assert other.stop(LIMIT_S)
    assert (done.get(timeout=LIMIT_S), done.get(timeout=LIMIT_S)) == (1, 2)


def test_the_daemon_serves_commands_timers_and_sockets(loop: Loop) -> None:
    read: SimpleQueue[bytes] = SimpleQueue()
    here, there = socket.socketpair()
    reader = Reader(there, read)
    loop.call_soon(lambda: loop.watch(there, reader, select.EPOLLIN))
    loop.call_soon(lambda: loop.call_at(time.monotonic() + 0.02, lambda: read.put(b"timer")))
    assert read.get(timeout=LIMIT_S) == b"timer"
    here.send(b"data")
    assert read.get(timeout=LIMIT_S) == b"data"
    loop.call_soon(lambda: loop.unwatch(there))
    here.close()


def run_until(loop: Loop, done: Callable[[], bool]) -> None:
    deadline = time.monotonic() + LIMIT_S
    while not done():
        assert time.monotonic() < deadline
        assert loop.turn(LIMIT_S)


def test_who_leads_serves_all_and_the_daemon_nothing(loop: Loop) -> None:
    ran_by: list[int] = []
    here, there = socket.socketpair()

    class Recorder:
        def on_event(self, events: int) -> None:
            ran_by.append(threading.get_ident())
            there.recv(100)

    assert loop.lead()
    loop.call_soon(lambda: loop.watch(there, Recorder(), select.EPOLLIN))
    loop.call_soon(lambda: loop.call_at(time.monotonic(), lambda: ran_by.append(threading.get_ident())))
    run_until(loop, lambda: len(ran_by) == 1)
    here.send(b"x")
    run_until(loop, lambda: len(ran_by) == 2)
    loop.follow()
    assert set(ran_by) == {threading.get_ident()}
    loop.call_soon(lambda: loop.unwatch(there))
    here.close()


def test_the_daemon_takes_over_timers_and_sockets_of_who_led(loop: Loop) -> None:
    done: SimpleQueue[int] = SimpleQueue()
    here, there = socket.socketpair()

    class Recorder:
        def on_event(self, events: int) -> None:
            done.put(len(there.recv(100)))

    armed: list[bool] = []

    def arm() -> None:
        loop.watch(there, Recorder(), select.EPOLLIN)
        loop.call_at(time.monotonic() + 0.05, lambda: done.put(1000))
        armed.append(True)

    assert loop.lead()
    loop.call_soon(arm)
    run_until(loop, lambda: bool(armed))
    loop.follow()
    assert done.get(timeout=LIMIT_S) == 1000  # the daemon slept without a limit when the timer was set
    here.send(b"12345")
    assert done.get(timeout=LIMIT_S) == 5
    loop.call_soon(lambda: loop.unwatch(there))
    here.close()


@pytest.mark.parametrize("leading", [False, True])
def test_a_bug_in_a_handler_is_reported_and_ends_the_loop(leading: bool) -> None:
    failures: SimpleQueue[Exception] = SimpleQueue()
    ended = threading.Event()
    loop = Loop(on_failure=failures.put, on_end=ended.set)
    loop.start()

    def fail() -> None:
        raise KeyError("bug")

    if leading:
        assert loop.lead()
        loop.call_soon(fail)
        while loop.turn(LIMIT_S):
            pass
        loop.follow()
    else:
        loop.call_soon(fail)
    assert isinstance(failures.get(timeout=LIMIT_S), KeyError)
    assert ended.wait(LIMIT_S)
    assert loop.stop(LIMIT_S)
    assert not loop.lead()
    loop.call_soon(fail)  # nobody runs it, nothing breaks


def test_no_event_of_a_closed_socket_meets_the_next_of_its_number(loop: Loop) -> None:
    """Both ready in one turn; the first closes the second and opens another, which must get another number."""
    met: SimpleQueue[str] = SimpleQueue()
    pairs = [socket.socketpair() for _ in range(2)]
    opened: list[tuple[socket.socket, socket.socket]] = []

    class Closer:
        def __init__(self, own: int) -> None:
            self.own = own

        def on_event(self, events: int) -> None:
            other = pairs[1 - self.own][1]
            number = other.fileno()
            loop.unwatch(other)
            opened.append(socket.socketpair())
            met.put("same" if number in (end.fileno() for end in opened[0]) else "another")
            loop.unwatch(pairs[self.own][1])

    assert loop.lead()
    for number, (near, far) in enumerate(pairs):
        near.send(b"x")
        loop.watch(far, Closer(number), select.EPOLLIN)
    loop.turn(LIMIT_S)
    loop.follow()
    assert met.get(timeout=LIMIT_S) == "another"
    assert met.empty()
    for near, far in (*pairs, *opened):
        near.close()
        far.close()


def test_a_consumer_is_busy_once_it_has_computed_or_was_away_for_long() -> None:
    consumer = Consumer()
    consumer.leads()
    assert not consumer.is_busy(), "it has led since the last look"
    end = time.thread_time() + 2 * BUSY_S
    while time.thread_time() < end:
        pass
    assert consumer.is_busy(), "it has computed since the last look"
    consumer.leads()
    found = [consumer.is_busy() for _ in range(PATIENCE + 1)]
    assert found == [False] * PATIENCE + [True], "it has done nothing, as if it waited for a CPU"


def test_a_consumer_that_has_ended_does_not_keep_the_daemon_waiting() -> None:
    consumer = Consumer()
    thread = threading.Thread(target=consumer.leads)
    thread.start()
    thread.join()
    assert any(consumer.is_busy() for _ in range(PATIENCE + 1)), "the daemon takes over"
