"""The store: a small key-value store with revisions. Every backend passes tests/controller/test_store.py."""

from abc import ABC, abstractmethod
from collections.abc import AsyncIterator
from dataclasses import dataclass

from elaswave.errors import FaultError

MAX_KEY_BYTES = 512
MAX_VALUE_BYTES = 64 * 1024 * 1024
"""Limits of one entry; a plan of 10^5 workers is about 10 MB."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One version of one key. `revision` counts all writes of the store, from 1."""

    key: str
    value: bytes
    revision: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """Result of a guarded write. `entry` is what the key holds now: the new value, or what was in the way.

    `entry` is None only where a compare-and-set failed because the key does not exist.
    """

    succeeded: bool
    entry: Entry | None


class Compacted(FaultError):
    """Revisions that a watch asked for are no longer kept: read the keys again and watch from there."""


class Store(ABC):
    """Linearizable single-key operations and a watch that loses nothing.

    A write that has returned is durable as far as the backend promises durability.
    """

    @abstractmethod
    async def get(self, key: str) -> Entry | None:
        """The newest version of `key`, or None."""

    @abstractmethod
    async def create_if_absent(self, key: str, value: bytes) -> Outcome:
        """Write `key` unless it exists."""

    @abstractmethod
    async def compare_and_set(self, key: str, value: bytes, revision: int) -> Outcome:
        """Write `key` if its newest version has `revision`."""

    @abstractmethod
    def watch(self, prefix: str, from_revision: int) -> AsyncIterator[Entry]:
        """Every version from `from_revision` on of all keys that start with `prefix`, in order of revision.

        Waits for ever: the caller cancels, or closes the store, which ends the iteration.
        Raises Compacted where older revisions than kept are asked for.
        """

    @abstractmethod
    async def close(self) -> None:
        """Release files and connections and end all watches. Idempotent."""
