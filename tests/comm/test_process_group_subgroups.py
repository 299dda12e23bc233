"""Groups of some ranks: a step that a loss has broken off is repeated on all of them, also on those that are whole."""

from pathlib import Path

import pytest
from nursery_client import LINKS, MEMORY, Nursery, both


@pytest.mark.parametrize(
    ("losses", "memory"),
    [
        ([[5, 1, 0]], MEMORY),
        ([[5, 1, 0]], LINKS),
        ([[5, 1, 1]], LINKS),
        ([[0, 2, 2]], MEMORY),
        ([[1, 1, 1], [5, 1, 1]], LINKS),
        ([[0, 1, 0], [2, 1, 2]], MEMORY),
        ([[3, 1, 1], [4, 2, 0], [5, 3, 1]], LINKS),
    ],
)
def test_a_step_is_repeated_in_all_groups(
    nursery: Nursery, tmp_path: Path, losses: list[list[int]], memory: str
) -> None:
    lost = tuple(worker for worker, _, _ in losses)
    found = nursery.run("sums_in_a_grid", 6, tmp_path, killed=lost, memory=memory, losses=losses)
    histories = list(found.values())
    assert all(history == histories[0] for history in histories)
    assert isinstance(histories[0], list)
    assert sorted(histories[0][-1]) == sorted(set(range(6)) - set(lost))


@both
def test_a_rank_that_hears_of_two_losses_at_once(nursery: Nursery, tmp_path: Path, memory: str) -> None:
    """Rank 0 has begun the step again after the first one by then; it is in a group with this one that stays whole."""
    found = nursery.run("sums_in_a_grid", 6, tmp_path, killed=(1, 5), memory=memory, losses=[[5, 1, 0]], untold=4)
    assert len({str(history) for history in found.values()}) == 1


def test_groups_that_a_loss_has_kept_from_being_made(nursery: Nursery, tmp_path: Path) -> None:
    found = nursery.run("groups_in_a_step", 5, tmp_path, killed=(4,), memory=MEMORY)
    assert set(map(str, found.values())) == {"[5, 4, 4, 4]"}
