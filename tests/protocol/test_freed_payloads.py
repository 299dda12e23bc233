"""What a step no longer needs is free at once: cycles would keep gigabytes of sums until garbage is collected."""

import gc

import pytest

from elaswave.core.protocol.state import PartialSum, ReducedShard
from elaswave.sim.explore import walk
from elaswave.sim.scenes import WALKS


@pytest.mark.parametrize("name", WALKS)
def test_no_sum_is_left_to_the_garbage_collector(name: str) -> None:
    gc.collect()
    gc.disable()
    gc.set_debug(gc.DEBUG_SAVEALL)
    try:
        walk(WALKS[name], seed=1)
        gc.collect()
        left = [type(found).__name__ for found in gc.garbage if isinstance(found, PartialSum | ReducedShard)]
    finally:
        gc.set_debug(0)
        gc.garbage.clear()
        gc.enable()
    assert not left
