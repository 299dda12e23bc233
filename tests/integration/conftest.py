"""Fixtures of the tests of real processes."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from harness import Ground, make_ground
from resident import Resident, resident_zygote


@pytest.fixture
def ground(tmp_path: Path) -> Iterator[Ground]:
    """A place for the runs of one test; nothing of them may be left at its end."""
    with make_ground(tmp_path) as made:
        yield made


@pytest.fixture(scope="session")
def resident() -> Iterator[Resident]:
    """A zygote for all tests that do not look at zygotes."""
    with resident_zygote() as made:
        yield made


@pytest.fixture
def warm_ground(tmp_path: Path, resident: Resident) -> Iterator[Ground]:
    """As `ground`; the workers are forked from the resident zygote."""
    with make_ground(tmp_path, resident) as made:
        yield made
