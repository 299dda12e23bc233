"""Memory inbox: an inbox whose consumer can wait for changes of memory at the same time."""

import time
from collections.abc import Sequence
from typing import TypeVar

from elaswave.comm.collectives.commands import Await
from elaswave.comm.futex import POLL_S, WORDS_LIMIT, Bell, wait_while
from elaswave.comm.inbox import Inbox

Item = TypeVar("Item")


class MemoryInbox(Inbox[Item]):
    """Any thread puts, one thread takes; while that waits for memory, a bell tells it of items."""

    def __init__(self) -> None:
        super().__init__()
        self._bell = Bell()

    def wait_with(self, awaited: Sequence[Await], deadline: float) -> None:
        """Wait for an item, or until one of what is awaited may be ready; may end early. Consumer thread only."""
        self.leave()
        before, self._wake = self._wake, self._bell.ring
        self._asleep = True
        try:
            # Words first: what changes after this look at what they stand for, changes them too.
            words = [*(found.word() for found in awaited), self._bell.word()]
            now = time.monotonic()
            limit_s = deadline - now if len(words) <= WORDS_LIMIT else min(deadline - now, POLL_S)
            if limit_s > 0 and not self.filled and not any(found.is_ready() for found in awaited):
                wait_while(words[:WORDS_LIMIT], now, limit_s)
        finally:
            self._asleep = False
            self._wake = before
