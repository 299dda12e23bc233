"""Random walks: crashes, suspects that come back, swaps of owners, cut links, spares, late reports, capped logs.

A failing walk prints its scene and seed: `walk(WALKS[scene], seed)` runs it again.
"""

from collections import Counter
from dataclasses import replace

import pytest

from elaswave.sim.explore import walk
from elaswave.sim.scenes import WALKS

WALKS_EACH = 48


@pytest.mark.slow
@pytest.mark.parametrize("name", WALKS)
def test_walks_keep_all_promises(name: str) -> None:
    scene = WALKS[name]
    seen: Counter[str] = Counter()
    over: Counter[str | None] = Counter()
    redone = 0
    for seed in range(WALKS_EACH):
        result = walk(scene, seed)
        seen.update(result.seen)
        over[result.over] += 1
        redone += result.redone
    # The walks were worth their time: most end well, work was done again, plans of every kind were made.
    assert over[None] > WALKS_EACH // 4
    assert redone > 0
    assert {"finish", "copies", "routes"} <= set(seen)
    assert "admit" in seen or not (scene.suspicions or scene.spares)


@pytest.mark.parametrize("name", [name for name, scene in WALKS.items() if scene.replicas > 0])
def test_fewer_failures_than_copies_never_need_a_checkpoint(name: str) -> None:
    scene = replace(WALKS[name], crashes=WALKS[name].replicas, suspicions=0)
    for seed in range(1000, 1000 + WALKS_EACH // 4):
        assert walk(scene, seed).over is None, f"seed {seed}"


@pytest.mark.parametrize("name", ["dp3, r=0", "r=0, cuts", "2x2, suspicions", "everything"])
def test_suspects_that_are_alive_never_cost_a_checkpoint(name: str) -> None:
    scene = replace(WALKS[name], crashes=0, suspicions=2)
    for seed in range(2000, 2000 + WALKS_EACH // 2):
        assert walk(scene, seed).over is None, f"seed {seed}"
