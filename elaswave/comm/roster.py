"""Roster: who of a lone torch job's processes is in it, written by compare-and-set on a store."""

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Protocol

from elaswave.core.ids import WorkerId
from elaswave.errors import ProtocolError

KEY = "elaswave/roster"
CONTENT_LIMIT_BYTES = 1 << 20


class Store(Protocol):
    """What is needed of a torch.distributed.Store."""

    def compare_set(self, key: str, expected: str, desired: str, /) -> bytes: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """Of one communicator in one epoch; removed go first, then added ones stand at the end."""

    epoch: int
    removed: tuple[WorkerId, ...] = ()
    added: tuple[WorkerId, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Roster:
    """epoch: 0 at first, one more with every loss and every admission. removed, added: workers, with their epochs.

    writer: who has made this epoch; None for the first one. Nobody comes back: who joins has a new number.
    """

    epoch: int
    removed: tuple[tuple[WorkerId, int], ...]
    added: tuple[tuple[WorkerId, int], ...] = ()
    writer: WorkerId | None = None

    def without(self, workers: Iterable[WorkerId], writer: WorkerId) -> "Roster":
        """The next one, in which these are removed too; the same one if they are already."""
        new = _new(workers, self.removed, self.epoch + 1)
        return replace(self, epoch=self.epoch + 1, removed=(*self.removed, *new), writer=writer) if new else self

    def with_added(self, workers: Iterable[WorkerId], writer: WorkerId) -> "Roster":
        """The next one, in which these have come; the same one if they were there already."""
        new = _new(workers, self.added, self.epoch + 1)
        return replace(self, epoch=self.epoch + 1, added=(*self.added, *new), writer=writer) if new else self

    def changes(self, members: Iterable[WorkerId], *, grows: bool) -> tuple[Change, ...]:
        """What has happened to a communicator that began with these members, by epoch; grows: new ones come to it.

        A loss concerns all communicators: who was in the lost member's repeats a step, and others would not know which
        of their operations with it belong to the first attempt.
        """
        known = set(members)
        changes: list[Change] = []
        lossy = {epoch for _, epoch in self.removed}
        for epoch in range(1, self.epoch + 1):
            added = tuple(worker for worker, when in self.added if when == epoch) if grows else ()
            known.update(added)
            removed = tuple(worker for worker, when in self.removed if when == epoch and worker in known)
            if added or epoch in lossy:
                changes.append(Change(epoch=epoch, removed=removed, added=added))
        return tuple(changes)

    def encode(self) -> str:
        """As text."""
        removed, added = [list(pair) for pair in self.removed], [list(pair) for pair in self.added]
        return json.dumps({"epoch": self.epoch, "removed": removed, "added": added, "writer": self.writer})


def _new(
    workers: Iterable[WorkerId], known: tuple[tuple[WorkerId, int], ...], epoch: int
) -> tuple[tuple[WorkerId, int], ...]:
    return tuple((worker, epoch) for worker in sorted(set(workers) - set(dict(known))))


def decode_roster(text: str | bytes) -> Roster:
    """Read what `encode` wrote. Raises ProtocolError for anything else."""
    if len(text) > CONTENT_LIMIT_BYTES:
        raise ProtocolError(f"a roster of {len(text)} bytes is over the limit of {CONTENT_LIMIT_BYTES}")
    try:
        found = json.loads(text)
        removed = tuple((WorkerId(int(worker)), int(epoch)) for worker, epoch in found["removed"])
        added = tuple((WorkerId(int(worker)), int(epoch)) for worker, epoch in found["added"])
        roster = Roster(epoch=int(found["epoch"]), removed=removed, added=added, writer=WorkerId(int(found["writer"])))
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        raise ProtocolError(f"a roster cannot be read: {error}") from error
    # Each epoch has changed something, and nobody is removed, or comes, twice.
    epochs = {epoch for _, epoch in (*removed, *added)}
    whole = bool(epochs) and (min(epochs), max(epochs), len(epochs)) == (1, roster.epoch, roster.epoch)
    if not whole or len(dict(removed)) < len(removed) or len(dict(added)) < len(added):
        raise ProtocolError(
            f"a roster of epoch {roster.epoch} contradicts itself: removed are {removed[:8]}, added {added[:8]}"
        )
    return roster


FIRST = Roster(epoch=0, removed=())


def remove(store: Store, known: Roster, workers: Iterable[WorkerId], *, by: WorkerId) -> Roster:
    """Write that these workers are gone, whoever else writes at the same time; the roster after that.

    Its writer is `by`, who asks for it, only where nobody else was faster. Nothing is written where `by` was removed
    itself: those that it misses have closed its links. Raises what the store raises when its process is gone.
    """
    gone = tuple(workers)
    return _write(store, known, lambda roster: roster.without(gone, by), by)


def add(store: Store, known: Roster, workers: Iterable[WorkerId], *, by: WorkerId) -> Roster:
    """The same for workers that come."""
    new = tuple(workers)
    return _write(store, known, lambda roster: roster.with_added(new, by), by)


def _write(store: Store, known: Roster, change: Callable[[Roster], Roster], by: WorkerId) -> Roster:
    expected = "" if known.epoch == 0 else known.encode()
    while True:
        wanted = change(known)
        if wanted.epoch == known.epoch or by in dict(known.removed):
            return known
        found = store.compare_set(KEY, expected, wanted.encode()).decode()
        if found == wanted.encode():
            return wanted
        if found in ("", expected):
            expected = ""
            continue
        expected, known = found, decode_roster(found)
