"""A pairwise covering set of layouts, failures and features: each run ends with the bits of the undisturbed one."""

import pytest
from covering import check_scenario
from harness import Ground, assert_same_training
from pairs import all_pairs
from scenario import FACTORS, Scenario, allowed_in_pairs

SCENARIOS = [Scenario.of(row) for row in all_pairs(FACTORS, allowed_in_pairs)]


@pytest.mark.slow
@pytest.mark.parametrize("scenario", SCENARIOS, ids=[scenario.name for scenario in SCENARIOS])
def test_same_bits_whatever_fails(warm_ground: Ground, scenario: Scenario) -> None:
    check_scenario(warm_ground, scenario)


@pytest.mark.slow
@pytest.mark.parametrize("start", ["fork", "spawn"])
@pytest.mark.parametrize("plain", [True, False], ids=["plain", "all-features"])
def test_one_worker_gives_the_bits_of_the_reference(ground: Ground, start: str, plain: bool) -> None:
    features = frozenset[str]() if plain else frozenset({"dropout", "tied", "recompute", "bf16"})
    job = Scenario(layout="4x1", kind="none", phase="forward", features=features).job
    assert_same_training(ground.run(["--standalone", f"--start={start}"], job.flags()), job)
