"""The process group "elastic" in real processes: what torch.distributed offers, and what remains of it after losses."""

import json
import os
import re
import runpy
import select
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent.parent
START_S = 60.0
JOB_S = 40.0
SHOWN = 1500


class Nursery:
    """A process that forks ranks; see process_group_nursery.py."""

    def __init__(self, temporary: str) -> None:
        self.temporary = Path(temporary)
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.comm.process_group_nursery", str(os.getpid())],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TMPDIR": temporary},
        )
        assert self._line(START_S) == "ready"

    def _line(self, limit_s: float) -> str:
        assert self.process.stdout is not None
        ready, _, _ = select.select([self.process.stdout], [], [], limit_s)
        assert ready, "the nursery does not answer"
        return self.process.stdout.readline().strip()

    def run(
        self, job: str, size: int, folder: Path, *, killed: tuple[int, ...] = (), **arguments: object
    ) -> dict[int, object]:
        """What the ranks that are not to be killed have returned."""
        assert self.process.stdin is not None
        wanted = {"job": job, "arguments": arguments, "size": size, "folder": str(folder), "limit_s": JOB_S}
        self.process.stdin.write(json.dumps(wanted) + "\n")
        self.process.stdin.flush()
        codes = json.loads(self._line(JOB_S + 10.0))
        expected = [-signal.SIGKILL if rank in killed else 0 for rank in range(size)]
        said = "\n".join(f"rank {rank}: {(folder / f'{rank}.txt').read_text()[-SHOWN:]}" for rank in range(size))
        assert codes == expected, said
        return {rank: json.loads((folder / f"{rank}.json").read_text()) for rank in range(size) if rank not in killed}

    def close(self) -> None:
        self.process.kill()
        self.process.communicate(timeout=10.0)


@pytest.fixture(scope="module")
def nursery() -> Iterator[Nursery]:
    with TemporaryDirectory(prefix="pg-") as temporary:  # short: it is part of the addresses of sockets
        found = Nursery(temporary)
        yield found
        found.close()


# Whole jobs: nothing more to check than that every rank has found what it expects.
@pytest.mark.parametrize(
    "job",
    [
        "reduce_everything",
        "move_everything",
        "uneven_and_objects",
        "messages",
        "leave_at_once",
        "take_what_was_sent",
        "groups_and_functional_collectives",
        "fsdp2_and_checkpoint",
    ],
)
def test_what_torch_distributed_offers(nursery: Nursery, tmp_path: Path, job: str) -> None:
    nursery.run(job, 4, tmp_path)


@pytest.mark.parametrize("frames", [0, 1, 2, 4])
@pytest.mark.parametrize("case", [(0, 0, None), (2, 1, "gradient_as_bucket_view"), (3, 3, "find_unused_parameters")])
def test_ddp_trains_on(nursery: Nursery, tmp_path: Path, frames: int, case: tuple[int, int, str | None]) -> None:
    worker, step, option = case
    options = {} if option is None else {option: True}
    losses = [(worker, step, frames)]
    found = nursery.run("trains_on", 4, tmp_path, killed=(worker,), trainer="ddp", losses=losses, options=options)
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


@pytest.mark.parametrize("trainer", ["fsdp2", "dtensor"])
@pytest.mark.parametrize(("worker", "frames"), [(2, 3), (0, 8)])
def test_shards_are_built_again(nursery: Nursery, tmp_path: Path, trainer: str, worker: int, frames: int) -> None:
    found = nursery.run("trains_on", 4, tmp_path, killed=(worker,), trainer=trainer, losses=[(worker, 2, frames)])
    check_history(found, 4, {worker: 2})


def test_losses_down_to_a_single_rank(nursery: Nursery, tmp_path: Path) -> None:
    losses = [(0, 1, 2), (3, 2, 5), (1, 3, 3)]
    found = nursery.run("trains_on", 4, tmp_path, killed=(0, 1, 3), trainer="ddp", losses=losses)
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
    model, batches = example["build"]()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    found: list[float] = []
    for step in range(example["STEPS"]):
        gone = example["VICTIM"] if step >= example["FATAL_STEP"] else None
        losses = [example["loss_of"](model, batches[rank]) for rank in range(example["RANKS"]) if rank != gone]
        found.append(losses[0].item())
        optimizer.zero_grad()
        torch.stack(losses).mean().backward()
        optimizer.step()
    return found


@pytest.mark.parametrize("second", [0, 1])
def test_a_rank_lost_while_the_others_reconfigure(nursery: Nursery, tmp_path: Path, second: int) -> None:
    losses = [(2, 1, 6), (second, 1, -1)]
    found = nursery.run("trains_on", 4, tmp_path, killed=(2, second), trainer="ddp", losses=losses)
    check_history(found, 4, {2: 1, second: 1})


def test_ranks_that_differ_in_shape(nursery: Nursery, tmp_path: Path) -> None:
    said = nursery.run("differ_in_shape", 4, tmp_path)
    assert "worker 1 sent 16 bytes" in str(said[0]) and "expects 12" in str(said[0]), said


def test_a_rank_lost_before_a_new_group(nursery: Nursery, tmp_path: Path) -> None:
    nursery.run("lose_a_rank_before_a_new_group", 4, tmp_path, killed=(3,))


@pytest.mark.parametrize("call", ["all_reduce", "recv", "ddp"])
def test_a_stopped_rank_is_named_within_the_timeout(nursery: Nursery, tmp_path: Path, call: str) -> None:
    said = nursery.run("stopped", 4, tmp_path, killed=(2,), call=call)
    assert "rank 2 (worker 2)" in str(said[3]), said  # rank 3 waits for it; in a collective others wait for each other


def test_a_rank_stopped_while_the_others_reconfigure(nursery: Nursery, tmp_path: Path) -> None:
    said = nursery.run("stopped_while_agreeing", 4, tmp_path, killed=(1, 3))
    assert any("(worker 3)" in str(text) for text in said.values()), said


def test_without_its_store_a_loss_ends_the_job(nursery: Nursery, tmp_path: Path) -> None:
    nursery.run("lose_the_store", 4, tmp_path, killed=(1, 3))
