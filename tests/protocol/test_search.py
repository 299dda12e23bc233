"""Every reachable state of small scenes: no promise breaks, and every end is a good one."""

import pytest

from elaswave.sim.explore import search
from elaswave.sim.scenes import EXHAUSTIVE

LIMIT = 20_000


@pytest.mark.parametrize("name", EXHAUSTIVE)
def test_every_state_of_a_small_scene_is_good(name: str) -> None:
    found = search(EXHAUSTIVE[name], limit=LIMIT)
    assert found.complete
    assert found.ends > 0
    # Smaller numbers would mean that something can no longer happen that could before.
    assert found.states > 100
    assert found.transitions > found.states
