"""A native communicator (gloo in its part) beside the elastic group, in real processes."""

from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from test_process_group import Nursery


@pytest.fixture(scope="module")
def native_nursery() -> Iterator[Nursery]:
    with TemporaryDirectory(prefix="nat-") as temporary:  # short: it is part of the addresses of sockets
        found = Nursery(temporary)
        yield found
        found.close()


@pytest.mark.parametrize("dies_at", [1, 5])
def test_sums_are_right_over_the_swap_and_over_a_loss(native_nursery: Nursery, tmp_path: Path, dies_at: int) -> None:
    found = native_nursery.run("swap_and_lose", 4, tmp_path, killed=(1,), dies_at=dies_at)
    assert len(set(found.values())) == 1
    ways = str(found[0])
    assert len(ways) == 12
    assert ways[dies_at] == "E"  # the step of the loss is repeated over the elastic group
    assert ways.endswith("NN")
    if dies_at == 5:
        assert ways[4] == "N"


def test_a_native_failure_without_a_loss_is_named(native_nursery: Nursery, tmp_path: Path) -> None:
    found = native_nursery.run("fail_alive", 3, tmp_path)
    assert all("the fabric is on fire" in str(said) for said in found.values())


def test_nobody_swaps_until_all_have_built(native_nursery: Nursery, tmp_path: Path) -> None:
    found = native_nursery.run("never_built", 3, tmp_path)
    assert found == {0: "None", 1: "no such device", 2: "None"}
