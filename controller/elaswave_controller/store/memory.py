"""The in-process store: the default on one machine, with an append log where a restart should find it again."""

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from pathlib import Path

from elaswave.errors import ConfigError, InvariantError
from elaswave_controller.store.interface import (
    MAX_KEY_BYTES,
    MAX_VALUE_BYTES,
    Compacted,
    Entry,
    Outcome,
    Store,
)
from elaswave_controller.store.log import AppendLog, open_log

DEFAULT_HISTORY = 4096
"""Versions kept for watches; a watcher that is further behind reads the keys again."""


class MemoryStore(Store):
    """Entries in a dict; used from one event loop. With a log, a write returns when it is on disk.

    The log is written on the event loop: 0.2 ms is less than a hop to a thread and back costs under load.
    """

    def __init__(
        self, log: AppendLog | None = None, entries: tuple[Entry, ...] = (), *, history: int = DEFAULT_HISTORY
    ) -> None:
        self._log = log
        self._entries = {entry.key: entry for entry in entries}
        self._history = deque(entries, maxlen=history)
        self._revision = max((entry.revision for entry in entries), default=0)
        self._changed = asyncio.Event()
        self._closed = False

    async def get(self, key: str) -> Entry | None:
        self._check_open()
        return self._entries.get(key)

    async def create_if_absent(self, key: str, value: bytes) -> Outcome:
        self._check_open()
        current = self._entries.get(key)
        if current is not None:
            return Outcome(succeeded=False, entry=current)
        return Outcome(succeeded=True, entry=self._write(key, value))

    async def compare_and_set(self, key: str, value: bytes, revision: int) -> Outcome:
        self._check_open()
        current = self._entries.get(key)
        if current is None or current.revision != revision:
            return Outcome(succeeded=False, entry=current)
        return Outcome(succeeded=True, entry=self._write(key, value))

    async def watch(self, prefix: str, from_revision: int) -> AsyncIterator[Entry]:
        next_revision = from_revision
        while not self._closed:
            for entry in self._since(next_revision):
                next_revision = entry.revision + 1
                if entry.key.startswith(prefix):
                    yield entry
            if next_revision <= self._revision:
                continue  # written while the caller was at work
            changed = self._changed
            await changed.wait()

    async def close(self) -> None:
        self._closed = True
        self._changed.set()
        if self._log is not None:
            self._log.close()

    def _write(self, key: str, value: bytes) -> Entry:
        if not 0 < len(key.encode()) <= MAX_KEY_BYTES:
            raise ConfigError(f"store key {key!r:.80}: must have 1 to {MAX_KEY_BYTES} bytes")
        if len(value) > MAX_VALUE_BYTES:
            raise ConfigError(f"value of {key!r} has {len(value)} bytes: the limit is {MAX_VALUE_BYTES}")
        entry = Entry(key=key, value=value, revision=self._revision + 1)
        if self._log is not None:
            self._log.append(entry)
        self._revision = entry.revision
        self._entries[key] = entry
        self._history.append(entry)
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()
        return entry

    def _since(self, revision: int) -> list[Entry]:
        if not self._history or revision > self._revision:
            return []
        oldest = self._history[0].revision
        if revision < oldest and oldest > 1:
            raise Compacted(f"revision {revision} is no longer kept, the oldest is {oldest}: read the keys again")
        return [entry for entry in self._history if entry.revision >= revision]

    def _check_open(self) -> None:
        if self._closed:
            raise InvariantError("the store was used after it was closed")


def open_memory_store(path: Path | None, *, history: int = DEFAULT_HISTORY) -> MemoryStore:
    """A store in this process; with `path`, what its log holds is there again. Raises ConfigError, OSError."""
    if path is None:
        return MemoryStore(history=history)
    log, entries = open_log(path)
    return MemoryStore(log, tuple(entries), history=history)
