"""Sums that are added up from host to host: the bits of the undisturbed run, with and without deaths."""

import pytest
from covering import check_scenario
from harness import Ground
from scenario import Scenario
from tiny_job import TinyOptions

GRID = ["--standalone", "--nproc-per-node=4", "--dp=4"]


@pytest.mark.parametrize("layout", ["4x1", "3x3"])
@pytest.mark.parametrize(("kind", "phase"), [("none", "forward"), ("kill", "reduce"), ("kill", "backward")])
def test_a_ring_gives_the_bits_of_the_reference(warm_ground: Ground, layout: str, kind: str, phase: str) -> None:
    check_scenario(warm_ground, Scenario(layout=layout, kind=kind, phase=phase, features=frozenset({"ring"})))


def test_where_order_changes_the_bits_it_is_that_of_the_ring_every_time(warm_ground: Ground) -> None:
    script = TinyOptions(accumulation="float32").flags()
    plans = ("ring", "ring", "direct")
    once, again, direct = (warm_ground.run([*GRID, f"--reduce={plan}"], script).need_report().digest for plan in plans)
    assert once
    assert once == again
    assert once != direct  # so it was the ring that added them up
