"""Loop: the one thread that waits for all sockets of a worker's links."""

import heapq
import os
import select
import signal
import socket
import threading
import time
from collections import deque
from collections.abc import Callable
from itertools import count
from typing import Protocol

from elaswave.comm.alarm import Alarm

EVENTS_PER_TURN = 64
# While a consumer that leads now and then is active, the daemon looks so often whether it is busy with something else.
# Frame by frame it leads again within 10 to 100 us, in which the daemon must not be woken; computing takes
# milliseconds, and what comes meanwhile fits the socket buffers at first. The timer is not set anew for each lead, as
# that costs up to 20 us in a virtual machine. Looks every 4 ms took 3 to 4 % of a pipeline with hops of 3 ms.
GRACE_S = 0.020
# It is busy if it has computed for so much of that time. If it has not, it most likely waits for a CPU among many
# processes: a daemon that took over then would only make it wait longer.
BUSY_S = 0.012
PATIENCE = 2
"""Looks after which the daemon takes over whatever the consumer does."""

Command = Callable[[], None]


class Handler(Protocol):
    """Owner of a watched socket."""

    def on_event(self, events: int) -> None:
        """The socket is ready as `events` (EPOLL flags) say, or was: must not block, must bear a false alarm."""


class Consumer:
    """What the daemon knows of the thread that leads now and then."""

    def __init__(self) -> None:
        self._thread = 0
        self._clock = time.CLOCK_MONOTONIC
        self._leads = 0
        self._seen = 0  # the leads, and the time the thread had computed, when the daemon looked last
        self._computed_s = 0.0
        self._looks = 0

    def leads(self) -> None:
        """The calling thread leads."""
        self._leads += 1
        if self._thread != threading.get_ident():
            self._thread = threading.get_ident()
            self._clock = time.pthread_getcpuclockid(self._thread)

    def is_busy(self) -> bool:
        """Whether it has done something else since the last look; daemon only."""
        try:
            computed_s = time.clock_gettime(self._clock)
        except OSError:
            return True  # the thread has ended
        before_s, self._computed_s = self._computed_s, computed_s
        if self._seen != self._leads:
            self._seen = self._leads
            self._looks = 0
            return False
        self._looks += 1
        return computed_s - before_s >= BUSY_S or self._looks >= PATIENCE


class Loop:
    """epoll, timers, and commands of other threads, run by one daemon thread.

    A thread that has nothing to do but wait for what the loop brings may lead instead (`lead`, `turn`, `follow`): it
    then runs the turns itself and the daemon sleeps, which saves each message a change of thread. The daemon takes over
    if nobody leads and the thread is busy when it looks, every GRACE_S after a lead. Turns exclude one another.

    `watch`, `unwatch` and `call_at` are for whoever runs the turn; `call_soon`, `wake` and `rearm` for any thread. A
    socket given to `unwatch` is closed at the end of the turn, so that no event of that turn can meet another socket of
    its number.
    """

    def __init__(self, *, on_failure: Callable[[Exception], None], on_end: Command) -> None:
        self._on_failure = on_failure
        self._on_end = on_end
        self._commands: deque[Command] = deque()
        self._timers: list[tuple[float, int, Command]] = []
        self._ties = count()
        self._handlers: dict[int, Handler] = {}
        self._to_close: list[socket.socket] = []
        self._turn_lock = threading.Lock()
        self._wake_lock = threading.Lock()
        self._wake_fd = -1  # -1: not running, nobody to wake
        self._epoll: select.epoll | None = None  # all sockets, and the wake-up
        self._daemon_epoll: select.epoll | None = None  # the alarm, and the other epoll while the daemon serves
        self._daemon_serves = True
        self._led = False
        self._consumer = Consumer()
        self._grace = Alarm(GRACE_S)
        self._grace_set = False
        self._thread: threading.Thread | None = None
        self._ending = False

    def start(self) -> None:
        """Start the thread; commands given before are run first."""
        epoll, daemon_epoll = select.epoll(), select.epoll()
        wake_fd = os.eventfd(1, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        epoll.register(wake_fd, select.EPOLLIN)
        daemon_epoll.register(epoll, select.EPOLLIN)
        grace_fd = self._grace.open()
        daemon_epoll.register(grace_fd, select.EPOLLIN)
        self._epoll, self._daemon_epoll = epoll, daemon_epoll
        self._wake_fd = wake_fd
        # A daemon: a worker that ends without close() must not hang in its exit.
        self._thread = threading.Thread(
            target=self._run, args=(daemon_epoll, grace_fd), name="elaswave-links", daemon=True
        )
        self._thread.start()

    def stop(self, limit_s: float) -> bool:
        """End the thread after the commands given so far, and wait for it; whether it ended within `limit_s`."""
        self.call_soon(self._end)
        thread = self._thread
        if thread is None:
            while self._commands:
                self._commands.popleft()()
            self._on_end()
            self._close_sockets()
            return True
        thread.join(limit_s)
        return not thread.is_alive()

    def lead(self) -> bool:
        """Take the turns over from the daemon until `follow`; False if the loop does not run."""
        self._turn_lock.acquire()
        if self._daemon_epoll is None or self._epoll is None or self._ending:
            self._turn_lock.release()
            return False
        if self._daemon_serves:
            # Not modify(0): a nested epoll wakes the waiter inside the kernel whatever it waits for.
            self._daemon_epoll.unregister(self._epoll)
            self._daemon_serves = False
        self._led = True
        self._consumer.leads()
        return True

    def follow(self) -> None:
        """Stop leading; the daemon takes over unless somebody leads again soon."""
        self._led = False
        self._turn_lock.release()
        # After the release, as the daemon tries the lock after it has marked the alarm as over: one sees the other.
        if not self._grace_set:
            self._set_grace()

    def _set_grace(self) -> None:
        with self._wake_lock:
            if self._wake_fd >= 0:
                self._grace_set = True
                self._grace.set()

    def call_soon(self, command: Command) -> None:
        """Have `command` run in a turn; dropped if the loop has ended. Any thread; never blocks."""
        self._commands.append(command)
        self.wake()

    def wake(self) -> None:
        """End the wait of whoever runs the turn. Any thread; never blocks."""
        with self._wake_lock:
            if self._wake_fd >= 0:
                os.eventfd_write(self._wake_fd, 1)

    def call_at(self, when: float, command: Command) -> None:
        """Have `command` run at `time.monotonic() >= when`."""
        heapq.heappush(self._timers, (when, next(self._ties), command))

    def watch(self, opened: socket.socket, handler: Handler, events: int) -> None:
        """Tell `handler` of events of `opened`, and of hang-ups and errors in any case; level-triggered."""
        if self._epoll is not None:
            self._epoll.register(opened, events)
            self._handlers[opened.fileno()] = handler

    def change_handler(self, opened: socket.socket, handler: Handler) -> None:
        """Tell `handler` instead of the one so far."""
        self._handlers[opened.fileno()] = handler

    def rearm(self, opened: socket.socket, events: int) -> None:
        """Change what is told of a watched socket. Any thread, if it can exclude `unwatch` meanwhile."""
        if self._epoll is not None:
            self._epoll.modify(opened, events)

    def unwatch(self, opened: socket.socket) -> None:
        """Tell nothing more of `opened`, and close it soon."""
        if self._handlers.pop(opened.fileno(), None) is not None and self._epoll is not None:
            self._epoll.unregister(opened)
        self._to_close.append(opened)

    def _end(self) -> None:
        self._ending = True

    def _run(self, daemon_epoll: select.epoll, grace_fd: int) -> None:
        # Signals are for the main thread, which could not be woken by one that lands here.
        signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        timeout: float | None = 0.0
        while not self._ending:
            ready = daemon_epoll.poll(timeout)
            timeout = None
            if any(fd == grace_fd for fd, _ in ready):
                self._grace.clear()
                self._grace_set = False
            if self._turn_lock.acquire(blocking=False):  # else who leads sets the alarm when it ends
                if self._daemon_serves or self._consumer.is_busy():
                    self.turn(0.0)
                    timeout = self._timeout()
                    self._turn_lock.release()
                else:
                    self._turn_lock.release()
                    self._set_grace()
        with self._turn_lock:
            self._finish()

    def turn(self, limit_s: float, on_wake: Command | None = None) -> bool:
        """Wait for events for at most `limit_s` seconds, call `on_wake`, handle what is due; False if the loop ends.

        For the daemon, and for who leads. Never raises Exception: a bug in a handler is reported and ends the loop.
        """
        epoll, daemon_epoll, timers = self._epoll, self._daemon_epoll, self._timers
        if self._ending or epoll is None or daemon_epoll is None:
            return not self._ending
        try:
            if not self._led and not self._daemon_serves:
                daemon_epoll.register(epoll, select.EPOLLIN)
                self._daemon_serves = True
            if timers:
                limit_s = min(limit_s, max(0.0, timers[0][0] - time.monotonic()))
            ready = epoll.poll(limit_s, EVENTS_PER_TURN)
            if on_wake is not None:
                on_wake()
            for fd, events in ready:
                handler = self._handlers.get(fd)
                if handler is not None:
                    handler.on_event(events)
                elif fd == self._wake_fd:
                    os.eventfd_read(fd)
            for _ in range(len(self._commands)):
                self._commands.popleft()()
            if timers:
                self._run_timers()
            if self._to_close:
                self._close_sockets()
        except Exception as error:  # outermost frame of the loop: nobody else could report it
            self._ending = True
            self._on_failure(error)
        return not self._ending

    def _run_timers(self) -> None:
        now = time.monotonic()
        while self._timers and self._timers[0][0] <= now:
            heapq.heappop(self._timers)[2]()

    def _finish(self) -> None:
        self._on_end()
        self._close_sockets()
        with self._wake_lock:
            os.close(self._wake_fd)
            self._wake_fd = -1
            self._grace.close()
        for epoll in (self._epoll, self._daemon_epoll):
            if epoll is not None:
                epoll.close()
        self._epoll = self._daemon_epoll = None

    def _timeout(self) -> float | None:
        if not self._timers:
            return None
        return max(0.0, self._timers[0][0] - time.monotonic())

    def _close_sockets(self) -> None:
        for opened in self._to_close:
            opened.close()
        self._to_close.clear()
