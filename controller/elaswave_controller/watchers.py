"""Operators that watch the job."""

import asyncio
from collections import deque

from elaswave.core.status import Finished
from elaswave.wire import WatchItem

_MAX_BEHIND = 10_000  # items; an operator that is further behind is let go


class Watcher:
    """One watch stream: items wait here until they are sent."""

    def __init__(self) -> None:
        self._items: deque[WatchItem] = deque()
        self._changed = asyncio.Event()
        self.overrun = False

    def put(self, item: WatchItem) -> None:
        """Add an item; a watcher that does not keep up loses its stream instead of slowing the job."""
        if len(self._items) >= _MAX_BEHIND:
            self.overrun = True
        else:
            self._items.append(item)
        self._changed.set()

    async def next(self) -> WatchItem | None:
        """The next item, as soon as there is one; None where the watcher was too slow."""
        while not self._items and not self.overrun:
            self._changed.clear()
            await self._changed.wait()
        return None if self.overrun else self._items.popleft()


class Watchers:
    """All watch streams. After Finished, a new one gets Finished at once."""

    def __init__(self) -> None:
        self._watchers: set[Watcher] = set()
        self._finished: Finished | None = None
        self._told = asyncio.Event()

    def open(self) -> Watcher:
        """A stream from now on; `close` it."""
        watcher = Watcher()
        if self._finished is not None:
            watcher.put(self._finished)
        self._watchers.add(watcher)
        return watcher

    def close(self, watcher: Watcher, *, told: bool) -> None:
        """The stream is over; `told`: Finished was sent on it."""
        self._watchers.discard(watcher)
        if told:
            self._told.set()

    def publish(self, item: WatchItem) -> None:
        """Show `item` to all."""
        if isinstance(item, Finished):
            self._finished = item
        for watcher in self._watchers:
            watcher.put(item)

    async def wait_told(self, limit_s: float) -> bool:
        """Wait until somebody was told that the job is over, at most `limit_s`; whether somebody was."""
        try:
            await asyncio.wait_for(self._told.wait(), limit_s)
        except TimeoutError:
            return False
        return True
