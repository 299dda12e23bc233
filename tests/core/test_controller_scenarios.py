"""The controller does what the scenario texts say. To write them anew: `python tests/core/controller_scenarios.py`."""

from pathlib import Path

import pytest
from controller_scenarios import FOLDER, play

TEXTS = sorted(FOLDER.glob("*.txt"))


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: path.stem)
def test_effects_are_as_written(path: Path) -> None:
    assert play(path.read_text()) == path.read_text()


def test_there_are_texts() -> None:
    assert len(TEXTS) >= 25
