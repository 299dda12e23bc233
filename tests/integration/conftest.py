"""Fixtures of the tests of real processes."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from harness import Ground, make_ground


@pytest.fixture
def ground(tmp_path: Path) -> Iterator[Ground]:
    """A place for the runs of one test; nothing of them may be left at its end."""
    with make_ground(tmp_path) as made:
        yield made
