"""A native communicator (gloo in its part) beside the elastic group, in real processes."""

from pathlib import Path

import pytest
from nursery_client import Nursery


@pytest.mark.parametrize("dies_at", [1, 5])
def test_sums_are_right_over_the_swap_and_over_a_loss(nursery: Nursery, tmp_path: Path, dies_at: int) -> None:
    found = nursery.run("swap_and_lose", 4, tmp_path, killed=(1,), dies_at=dies_at)
    assert len(set(found.values())) == 1
    ways = str(found[0])
    assert len(ways) == 12
    assert ways[dies_at] == "E"  # the step of the loss is repeated over the elastic group
    assert ways.endswith("NN")
    if dies_at == 5:
        assert ways[4] == "N"


def test_nothing_is_built_before_the_members_are_agreed_on(nursery: Nursery, tmp_path: Path) -> None:
    found = nursery.run("edit_and_lose", 4, tmp_path, killed=(1,), dies_at=5, too_early=True)
    assert [shrunk for _, shrunk in found.values()] == [0, 0, 0], "all ranks have dropped theirs"


@pytest.mark.parametrize(("dies_at", "shrinks"), [(1, {0, 1}), (5, {1})])
def test_a_native_communicator_is_edited_after_a_loss(
    nursery: Nursery, tmp_path: Path, dies_at: int, shrinks: set[int]
) -> None:
    found = nursery.run("edit_and_lose", 4, tmp_path, killed=(1,), dies_at=dies_at)
    assert len({shrunk for _, shrunk in found.values()}) == 1
    for ways, shrunk in found.values():
        assert shrunk in shrinks, "what is not in use yet is made from nothing"
        assert ways[dies_at] == "E"
        assert ways.endswith("NN")


@pytest.mark.parametrize("index", [0, 1])
@pytest.mark.parametrize(
    ("deaths", "ways"),
    [
        ({3: 1}, "ENNNNNNN"),  # round a loss without a new communicator
        ({3: 4, 5: 3}, "ENNNNNNN"),  # the first row is whole, and the last column
        ({3: 1, 5: 5}, "ENNNNEEE"),  # no row is whole
    ],
)
def test_a_grid_sums_round_its_losses(
    nursery: Nursery, tmp_path: Path, deaths: dict[int, int], ways: str, index: int
) -> None:
    killed = tuple(deaths.values())
    found = nursery.run("grid_and_lose", 6, tmp_path, killed=killed, deaths=deaths, index=index)
    assert len(found) == 6 - len(killed)
    for taken, made in found.values():
        assert taken == ways + "E" + "N" * 3, "then a grid of whoever is left"
        assert made == 2, "a row and a column"


def test_a_native_failure_without_a_loss_is_named(nursery: Nursery, tmp_path: Path) -> None:
    found = nursery.run("fail_alive", 3, tmp_path)
    assert all("the fabric is on fire" in str(said) for said in found.values())


def test_nobody_swaps_until_all_have_built(nursery: Nursery, tmp_path: Path) -> None:
    found = nursery.run("never_built", 3, tmp_path)
    assert found == {0: "None", 1: "no such device", 2: "None"}
