"""Workers that begin a step under different plans still end it: nobody waits for what waits behind another's wait."""

import pytest
from executed_system import walk_executed

from elaswave.core.config import ControllerConfig
from elaswave.core.shape import CHUNK_ELEMENTS
from elaswave.sim.system import Harm, SystemScene

CASES = {
    "1x4, two die": (1, 4, 2, {0: 3, 3: 3}, 16),
    "1x4, one dies": (1, 4, 1, {1: 3}, 24),
    "2x2, two die": (2, 2, 2, {1: 3, 2: 3}, 12),
}


@pytest.mark.slow
@pytest.mark.parametrize("unbuffered", [False, True], ids=["buffered", "unbuffered"])
@pytest.mark.parametrize("name", CASES)
def test_a_step_ends_whoever_begins_it_under_which_plan(name: str, unbuffered: bool) -> None:
    dp, pp, replicas, doomed, seeds = CASES[name]
    config = ControllerConfig(dp=dp, pp=pp, nproc_per_node=dp * pp, replicas=replicas, shard_elements=CHUNK_ELEMENTS)
    scene = SystemScene(config=config, harm=Harm(), layers=7, micro_batches=8, steps=8)
    for seed in range(seeds):
        system = walk_executed(scene, seed, doomed, unbuffered=unbuffered)
        assert system.ended is not None, f"seed {seed}: all wait for ever"
        assert getattr(system.ended, "exit_code", 0) == 0, f"seed {seed}: {system.ended}"
