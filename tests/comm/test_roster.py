"""The roster on a store that several write to."""

import torch.distributed as dist

from elaswave.comm.roster import FIRST, remove
from elaswave.core.ids import WorkerId


def test_who_was_removed_removes_nobody() -> None:
    """Its links were closed by all others, whom it would otherwise take for lost, one after the other."""
    store = dist.HashStore()
    first = remove(store, FIRST, [WorkerId(2)], by=WorkerId(0))
    assert remove(store, FIRST, [WorkerId(0)], by=WorkerId(2)) == first
    second = remove(store, FIRST, [WorkerId(1)], by=WorkerId(0))
    assert (second.epoch, second.removed) == (2, ((WorkerId(2), 1), (WorkerId(1), 2)))
