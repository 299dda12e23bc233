"""Fixtures of the launcher's tests."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from launch_harness import Place, make_place


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    """A working folder and a run folder of the test's own."""
    with make_place(tmp_path) as made:
        yield made
