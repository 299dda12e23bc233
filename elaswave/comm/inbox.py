"""Inbox: where a worker's one consumer thread finds what links, the agent's socket and timers have for it."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from typing import Generic, NamedTuple, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from elaswave.core.ids import WorkerId
from elaswave.errors import InvariantError, PeerError

Item = TypeVar("Item")


class Received(NamedTuple):
    """One frame from `peer`.

    payload: uint8, one-dimensional, starts at a multiple of 64 bytes, owned by whoever holds it and writable;
    `torch.from_numpy(payload).view(dtype)` shares its memory. Empty if the frame had no payload.
    """

    peer: WorkerId
    kind: int
    meta: bytes
    payload: NDArray[np.uint8]


@dataclass(frozen=True, slots=True, kw_only=True)
class PeerClosed:
    """The links with `peer` are down, both ways, or a dial failed.

    Once per incident: all frames that are lost in it were sent before it was put here; frames sent later dial anew.
    error: LinkClosed (hang-up, refused or unanswered dial) or ProtocolError. orderly: the peer said good-bye first.
    """

    peer: WorkerId
    error: PeerError
    orderly: bool = False

    @property
    def reason(self) -> str:
        """What happened, as a sentence."""
        return str(self.error)


@dataclass(frozen=True, slots=True, kw_only=True)
class ConnectionRefused:
    """A connection to our listener that did not become a link: garbage, wrong token, wrong worker, no file descriptor.

    At most one a second; count: all refusals so far.
    """

    error: PeerError
    count: int


@dataclass(frozen=True, slots=True, kw_only=True)
class LinksFailed:
    """The I/O thread ended by a bug of ours; all links are closed and `send` raises from here on."""

    error: InvariantError


LinkItem = Received | PeerClosed | ConnectionRefused | LinksFailed


class LinkSink(Protocol):
    """Where links put what happens: an Inbox of a type that holds at least LinkItem."""

    def put(self, item: LinkItem, /) -> None: ...

    def attach(self, driver: "Driver", /) -> None: ...


class Driver(Protocol):
    """What a consumer runs while it waits (see Loop): `lead`; if that was True, turns; then `follow`."""

    def lead(self) -> bool: ...

    def turn(self, limit_s: float, on_wake: Callable[[], None] | None = None) -> bool: ...

    def follow(self) -> None: ...

    def wake(self) -> None: ...


class Inbox(Generic[Item]):
    """Unbounded first-in-first-out mailbox: any thread puts, one thread takes.

    `put` wakes the consumer only if it waits, so a busy consumer costs no wake-ups. Items of one putting thread keep
    their order. No bound: what comes in is what the protocol asked for, and its frames are bounded by the sender's log.
    """

    def __init__(self) -> None:
        self._queue: SimpleQueue[Item] = SimpleQueue()
        self._first: list[Item] = []  # what wait() had to take out to see it, and what was put back
        self._driver: Driver | None = None
        self._leads = False  # the consumer has the driver's turns
        self._asleep = False  # the consumer waits for something that `_wake` ends
        self._wake: Callable[[], None] = _nobody

    def attach(self, driver: Driver) -> None:
        """Have `wait` run `driver` meanwhile, which saves a change of thread for each message. Consumer thread only."""
        self._driver = driver
        self._wake = driver.wake

    def put(self, item: Item, /) -> None:
        """Append `item` and wake the consumer; never blocks."""
        self._queue.put(item)
        # wait() sets _asleep before it looks at the queue for the last time, so one of both sees the other.
        if self._asleep:
            self._wake()

    def put_back(self, items: Sequence[Item]) -> None:
        """Put items that were taken before all others again, in their order. Consumer thread only."""
        self._first = [*items, *self._first]

    @property
    def filled(self) -> bool:
        """An item is here. Consumer thread only."""
        return bool(self._first) or self._queue.qsize() > 0

    def take_all(self) -> list[Item]:
        """All items that are here, oldest first; empty if none; never blocks. Consumer thread only."""
        count = self._queue.qsize()
        if not count and not self._first:
            return []
        items, self._first = self._first, []
        items.extend([self._queue.get_nowait() for _ in range(count)])
        return items

    def poll(self) -> None:
        """Put in what the driver can bring without waiting. Consumer thread only."""
        driver = self._driver
        if driver is not None and (self._leads or driver.lead()):
            self._leads = True
            driver.turn(0.0)
            self.leave()

    def wait(self, deadline: float, *, stay: bool = False) -> bool:
        """Wait for an item until `time.monotonic() == deadline`; whether there is one. Consumer thread only.

        stay: the driver's turns are the consumer's from then on, in and out of `wait`, until `leave`.
        """
        if self._first or self._queue.qsize():
            return True
        timeout = deadline - time.monotonic()
        if timeout <= 0:
            return False
        driver = self._driver
        if driver is not None and (self._leads or driver.lead()):
            self._leads = True
            lives = False
            try:
                lives = self._wait_leading(driver, timeout, deadline)
            finally:
                if not (stay and lives):
                    self.leave()
            if self._queue.qsize():
                return True
            timeout = max(0.0, deadline - time.monotonic())
        try:
            self._first.append(self._queue.get(timeout=timeout))
        except Empty:
            return False
        return True

    def leave(self) -> None:
        """The driver's turns are its own again; nothing happens where they are. Consumer thread only."""
        if self._leads and self._driver is not None:
            self._leads = False
            self._driver.follow()

    def _wait_leading(self, driver: Driver, timeout: float, deadline: float) -> bool:
        """Run the driver's turns until there is an item, the deadline, or the driver's end; whether it lives."""
        try:
            while True:
                self._asleep = True
                if self._queue.qsize() or timeout <= 0:
                    return True
                if not driver.turn(timeout, self._awake):
                    return False
                if self._queue.qsize():
                    return True
                timeout = deadline - time.monotonic()
        finally:
            self._asleep = False

    def _awake(self) -> None:
        self._asleep = False


def _nobody() -> None:
    """Nobody is to be woken."""
