"""Processes that join a lone job which runs, and losses meanwhile: all ranks end with the weights of their history."""

from pathlib import Path

import pytest
from nursery_client import LINKS, MEMORY, Nursery, both


def check_histories(found: dict[int, object], size: int) -> None:
    histories = list(found.values())
    assert all(history == histories[0] for history in histories)
    assert isinstance(histories[0], list)
    assert {worker for members in histories[0] for worker in members} <= set(range(size))


@both
@pytest.mark.parametrize(("ranks", "size"), [(1, 2), (2, 4), (3, 4)])
def test_processes_join(nursery: Nursery, tmp_path: Path, memory: str, ranks: int, size: int) -> None:
    found = nursery.run("train_and_join", size, tmp_path, memory=memory, ranks=ranks)
    check_histories(found, size)


def test_one_that_keeps_to_links_joins_a_group_in_memory(nursery: Nursery, tmp_path: Path) -> None:
    found = nursery.run("train_and_join", 4, tmp_path, ranks=3, memory_of_newcomers=LINKS)
    check_histories(found, 4)


@pytest.mark.parametrize(("lines", "memory"), [(0, MEMORY), (20, MEMORY), (20, LINKS), (60, MEMORY)])
@pytest.mark.parametrize("place", ["admit", "share", "step"])
def test_losses_while_processes_join(nursery: Nursery, tmp_path: Path, memory: str, place: str, lines: int) -> None:
    for lost in (0, 1, 3):  # the first one, another one, one that joins
        folder = tmp_path / str(lost)
        folder.mkdir()
        losses = [(lost, 0, place, lines)]
        found = nursery.run("train_and_join", 5, folder, killed=(lost,), memory=memory, ranks=3, losses=losses)
        check_histories(found, 5)


@both
def test_groups_before_and_after(nursery: Nursery, tmp_path: Path, memory: str) -> None:
    nursery.run("groups_before_and_after", 4, tmp_path, memory=memory, ranks=3)


def test_all_with_the_state_are_lost(nursery: Nursery, tmp_path: Path) -> None:
    said = nursery.run("all_with_the_state_are_lost", 3, tmp_path, killed=(0,))
    assert all("FaultError: all ranks that had the state" in str(text) for text in said.values()), said


@both
def test_an_applicant_that_dies_is_not_waited_for(nursery: Nursery, tmp_path: Path, memory: str) -> None:
    nursery.run("applicants_that_die", 5, tmp_path, killed=(4,), memory=memory)


def test_who_gives_up_is_not_let_in(nursery: Nursery, tmp_path: Path) -> None:
    assert nursery.run("apply_in_vain", 2, tmp_path) == {0: 1, 1: False}


@both
def test_a_loss_while_others_join_is_raised_on_all_or_on_none(nursery: Nursery, tmp_path: Path, memory: str) -> None:
    """One that hears of both at once has repeated nothing otherwise, what the rest of the program may have to."""
    raised = nursery.run("loss_while_others_join", 4, tmp_path, killed=(2,), memory=memory)
    assert raised == {0: True, 1: True, 3: False}
