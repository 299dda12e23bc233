"""The process group "elastic" in real processes: what torch.distributed offers, and what remains of it after losses."""

import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from nursery_client import LINKS, MEMORY, ROOT, Nursery, both
from torch import nn


# Whole jobs: nothing more to check than that every rank has found what it expects.
@pytest.mark.parametrize(
    ("job", "memory"),
    [
        ("reduce_everything", MEMORY),
        ("reduce_everything", LINKS),
        ("move_everything", MEMORY),
        ("move_everything", LINKS),
        ("uneven_and_objects", MEMORY),
        ("uneven_and_objects", LINKS),
        ("messages", MEMORY),
        ("leave_at_once", MEMORY),
        ("take_what_was_sent", MEMORY),
        ("groups_and_functional_collectives", MEMORY),
        ("groups_and_functional_collectives", LINKS),
        ("fsdp2_and_checkpoint", MEMORY),
        ("powersgd", MEMORY),
        ("powersgd", LINKS),
        ("abort_from_threads", MEMORY),
        ("abort_from_threads", LINKS),
    ],
)
def test_what_torch_distributed_offers(nursery: Nursery, tmp_path: Path, job: str, memory: str) -> None:
    nursery.run(job, 4, tmp_path, memory=memory)


@pytest.mark.parametrize("lines", [0, 9, 30, 55, 80])
@pytest.mark.parametrize(("worker", "step"), [(0, 0), (3, 3), (1, 4), (2, 6)])
def test_collectives_go_on_after_a_loss(nursery: Nursery, tmp_path: Path, worker: int, step: int, lines: int) -> None:
    for memory in (MEMORY, LINKS) if lines == 30 else (MEMORY,):
        folder = tmp_path / memory
        folder.mkdir()
        found = nursery.run("works_on", 4, folder, killed=(worker,), memory=memory, losses=[(worker, step, lines)])
        check_history(found, 4, {worker: step})


@both
def test_a_rank_whose_end_takes_long(nursery: Nursery, tmp_path: Path, memory: str) -> None:
    nursery.run("killed_and_held", 4, tmp_path, killed=(2,), memory=memory)


@pytest.mark.parametrize("length", [100, 50_000])
def test_a_rank_killed_in_a_barrier(nursery: Nursery, tmp_path: Path, length: int) -> None:
    succeeded = nursery.run("killed_in_a_barrier", 4, tmp_path, killed=(2,), length=length)
    assert len(set(succeeded.values())) == 1, succeeded


@pytest.mark.parametrize(
    ("case", "lines", "memory"),
    [
        (0, 0, MEMORY),
        (0, 20, LINKS),
        (0, 120, MEMORY),
        (1, 20, MEMORY),
        (1, 60, MEMORY),
        (1, 120, LINKS),
        (2, 0, LINKS),
        (2, 20, MEMORY),
        (2, 60, MEMORY),
    ],
)
def test_ddp_trains_on(nursery: Nursery, tmp_path: Path, case: int, lines: int, memory: str) -> None:
    worker, step, option = [(0, 0, None), (2, 1, "gradient_as_bucket_view"), (3, 3, "find_unused_parameters")][case]
    options = {} if option is None else {option: True}
    losses = [(worker, step, lines)]
    found = nursery.run(
        "trains_on", 4, tmp_path, killed=(worker,), memory=memory, trainer="ddp", losses=losses, options=options
    )
    check_history(found, 4, {worker: step})


def check_history(found: dict[int, object], size: int, lost: dict[int, int]) -> None:
    """All survivors have seen the same members in each step; a lost one until it died, in `step` or right behind it."""
    histories = list(found.values())
    assert all(history == histories[0] for history in histories), found
    history = histories[0]
    assert isinstance(history, list)
    for step, members in enumerate(history):
        gone = [worker for worker in lost if lost[worker] + 1 < step]
        there = [worker for worker in range(size) if step < lost.get(worker, len(history))]
        assert set(there) <= set(members) and not set(gone) & set(members), found


@pytest.mark.parametrize(
    ("trainer", "loss", "memory"),
    [
        ("fsdp2", (2, 2, 20), MEMORY),
        ("fsdp2", (0, 2, 60), LINKS),
        ("dtensor", (0, 2, 20), MEMORY),
        ("dtensor", (2, 2, 10), LINKS),
    ],
)
def test_shards_are_built_again(
    nursery: Nursery, tmp_path: Path, trainer: str, loss: tuple[int, int, int], memory: str
) -> None:
    worker, step, _ = loss
    found = nursery.run("trains_on", 4, tmp_path, killed=(worker,), memory=memory, trainer=trainer, losses=[loss])
    check_history(found, 4, {worker: step})


@both
def test_losses_down_to_a_single_rank(nursery: Nursery, tmp_path: Path, memory: str) -> None:
    losses = [(0, 1, 15), (3, 2, 40), (1, 3, 20)]
    found = nursery.run("trains_on", 4, tmp_path, killed=(0, 1, 3), memory=memory, trainer="ddp", losses=losses)
    check_history(found, 4, {0: 1, 3: 2, 1: 3})
    assert not list(nursery.temporary.glob("elaswave-*"))  # of the killed ranks too


def test_the_example() -> None:
    command = [sys.executable, str(ROOT / "examples" / "ddp_survives.py")]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=90.0, env={**os.environ, "PYTHONPATH": str(ROOT)}, check=False
    )
    assert done.returncode == 0, done.stderr
    assert re.findall(r"(\d) ranks", done.stdout) == ["4"] * 3 + ["3"] * 3
    assert "exit codes: [0, 0, -9, 0]" in done.stdout
    losses = [float(found) for found in re.findall(r"loss of rank 0 (\S+)", done.stdout)]
    assert losses == pytest.approx(undisturbed_losses(), abs=2e-6)


def undisturbed_losses() -> list[float]:
    """Of the example's rank 0 in each step: one process computes the mean over whoever was there."""
    example = runpy.run_path(str(ROOT / "examples" / "ddp_survives.py"))
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 256), nn.Tanh(), nn.Linear(256, 64))
    batches = torch.randn(example["RANKS"], 8, 64)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    found: list[float] = []
    for step in range(example["STEPS"]):
        gone = example["VICTIM"] if step >= example["FATAL_STEP"] else None
        there = [batch for rank, batch in enumerate(batches) if rank != gone]
        losses = [(model(batch) - batch.flip(-1)).square().mean() for batch in there]
        found.append(losses[0].item())
        optimizer.zero_grad()
        torch.stack(losses).mean().backward()
        optimizer.step()
    return found


@pytest.mark.parametrize(("second", "memory"), [(0, MEMORY), (1, MEMORY), (1, LINKS)])
def test_a_rank_lost_while_the_others_reconfigure(nursery: Nursery, tmp_path: Path, second: int, memory: str) -> None:
    losses = [(2, 1, 6), (second, 1, -1)]
    found = nursery.run("trains_on", 4, tmp_path, killed=(2, second), memory=memory, trainer="ddp", losses=losses)
    check_history(found, 4, {2: 1, second: 1})


def test_ranks_that_differ_in_shape(nursery: Nursery, tmp_path: Path) -> None:
    said = nursery.run("differ_in_shape", 4, tmp_path, memory=LINKS)
    assert "worker 1 sent 16 bytes" in str(said[0]) and "expects 12" in str(said[0]), said


def test_ranks_that_differ_in_shape_in_memory(nursery: Nursery, tmp_path: Path) -> None:
    said = nursery.run("differ_in_shape", 4, tmp_path)
    assert all(f"while rank {rank} expects {16 if rank == 1 else 12} bytes" in str(said[rank]) for rank in said), said


def test_a_rank_lost_before_a_new_group(nursery: Nursery, tmp_path: Path) -> None:
    nursery.run("lose_a_rank_before_a_new_group", 4, tmp_path, killed=(3,))


@pytest.mark.parametrize(
    ("call", "memory"), [("all_reduce", MEMORY), ("all_reduce", LINKS), ("recv", MEMORY), ("ddp", MEMORY)]
)
def test_a_stopped_rank_is_named_within_the_timeout(nursery: Nursery, tmp_path: Path, call: str, memory: str) -> None:
    said = nursery.run("stopped", 4, tmp_path, killed=(2,), memory=memory, call=call)
    assert "rank 2 (worker 2)" in str(said[3]), said  # rank 3 waits for it; in a collective others wait for each other


def test_a_rank_stopped_while_the_others_reconfigure(nursery: Nursery, tmp_path: Path) -> None:
    said = nursery.run("stopped_while_agreeing", 4, tmp_path, killed=(1, 3))
    assert any("(worker 3)" in str(text) for text in said.values()), said


@both
def test_without_its_store_a_loss_ends_the_job(nursery: Nursery, tmp_path: Path, memory: str) -> None:
    nursery.run("lose_the_store", 4, tmp_path, killed=(1, 3), memory=memory)
