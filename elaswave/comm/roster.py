"""Roster: who of a lone torch job's processes is still in it, written by compare-and-set on a store."""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

from elaswave.core.ids import WorkerId
from elaswave.errors import ProtocolError

KEY = "elaswave/roster"
CONTENT_LIMIT_BYTES = 1 << 20


class Store(Protocol):
    """What is needed of a torch.distributed.Store."""

    def compare_set(self, key: str, expected: str, desired: str, /) -> bytes: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Roster:
    """epoch: 0 at first, one more with every loss. removed: the epoch in which a worker was removed.

    writer: who has made this epoch; None for the first one.
    """

    epoch: int
    removed: tuple[tuple[WorkerId, int], ...]
    writer: WorkerId | None = None

    def without(self, workers: Iterable[WorkerId], writer: WorkerId) -> "Roster":
        """The next one, in which these are removed too; the same one if they are already."""
        known = dict(self.removed)
        new = sorted(set(workers) - set(known))
        if not new:
            return self
        removed = (*self.removed, *((worker, self.epoch + 1) for worker in new))
        return Roster(epoch=self.epoch + 1, removed=removed, writer=writer)

    def epoch_of(self, members: Iterable[WorkerId]) -> int:
        """Epoch of a communicator that began with these members: that of its last loss."""
        wanted = set(members)
        return max((epoch for worker, epoch in self.removed if worker in wanted), default=0)

    def encode(self) -> str:
        """As text."""
        removed = [list(pair) for pair in self.removed]
        return json.dumps({"epoch": self.epoch, "removed": removed, "writer": self.writer})


def decode_roster(text: str | bytes) -> Roster:
    """Read what `encode` wrote. Raises ProtocolError for anything else."""
    if len(text) > CONTENT_LIMIT_BYTES:
        raise ProtocolError(f"a roster of {len(text)} bytes is over the limit of {CONTENT_LIMIT_BYTES}")
    try:
        found = json.loads(text)
        removed = tuple((WorkerId(int(worker)), int(epoch)) for worker, epoch in found["removed"])
        roster = Roster(epoch=int(found["epoch"]), removed=removed, writer=WorkerId(int(found["writer"])))
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        raise ProtocolError(f"a roster cannot be read: {error}") from error
    # Each epoch has removed somebody, and nobody is removed twice.
    epochs = {epoch for _, epoch in removed}
    whole = bool(epochs) and (min(epochs), max(epochs), len(epochs)) == (1, roster.epoch, roster.epoch)
    if not whole or len(dict(removed)) < len(removed):
        raise ProtocolError(f"a roster of epoch {roster.epoch} contradicts itself: it has removed {removed[:8]}")
    return roster


FIRST = Roster(epoch=0, removed=())


def remove(store: Store, known: Roster, workers: Iterable[WorkerId], *, by: WorkerId) -> Roster:
    """Write that these workers are gone, whoever else writes at the same time; the roster after that.

    Its writer is `by`, who asks for it, only where nobody else was faster. Nothing is written where `by` was removed
    itself: those that it misses have closed its links. Raises what the store raises when its process is gone.
    """
    gone = tuple(workers)
    expected = "" if known.epoch == 0 else known.encode()
    while True:
        wanted = known.without(gone, by)
        if wanted.epoch == known.epoch or by in dict(known.removed):
            return known
        found = store.compare_set(KEY, expected, wanted.encode()).decode()
        if found == wanted.encode():
            return wanted
        if found in ("", expected):
            expected = ""
            continue
        expected, known = found, decode_roster(found)
