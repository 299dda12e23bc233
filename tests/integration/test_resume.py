"""Durable checkpoints: everything is killed, and another layout goes on with the same bits."""

from pathlib import Path

import pytest
from harness import Ended, Ground, assert_same_training, oracle
from tiny_job import TinyOptions

pytestmark = pytest.mark.slow

TWO_BY_TWO = ["--nproc-per-node=4", "--dp=2", "--pp=2"]
OTHERS = {
    "4x1": ["--nproc-per-node=4", "--dp=4"],
    "1x3": ["--nproc-per-node=3", "--pp=3"],
    "one": ["--nproc-per-node=1"],
}
JOB = TinyOptions(steps=60, dropout=0.1, tied=1, clip=0.5, dtype="bfloat16")
SAVE_EVERY = 5


def saving(folder: Path) -> list[str]:
    return ["--standalone", f"--save-every={SAVE_EVERY}", f"--save-dir={folder}"]


def newest(folder: Path) -> int:
    """Step of the newest checkpoint that is complete."""
    name = (folder / "latest").read_text().strip()
    assert (folder / name / "checkpoint.json").is_file()
    return int(name.removeprefix("step_"))


def assert_resumed(ended: Ended, job: TinyOptions, first: int) -> None:
    assert ended.exit_code == 0, ended.story()
    report, wanted = ended.need_report(), oracle(job)
    assert (report.first_step, report.steps) == (first, job.steps), report.text
    assert report.losses == wanted.losses[first:], report.text
    assert report.digest == wanted.digest, report.text


@pytest.mark.parametrize("layout", OTHERS)
def test_everything_is_killed_and_another_layout_goes_on(warm_ground: Ground, tmp_path: Path, layout: str) -> None:
    folder = tmp_path / "saved"
    job = warm_ground.start([*saving(folder), *TWO_BY_TWO], [*JOB.flags(), "--print-steps=1"])
    job.wait_line(f"tiny step {4 * SAVE_EVERY}$")
    job.process.kill()
    job.wait()
    warm_ground.check_nothing_left(killed=True)
    first = newest(folder)
    assert first % SAVE_EVERY == 0
    assert SAVE_EVERY <= first < JOB.steps
    ended = warm_ground.run([*saving(folder), "--resume=auto", *OTHERS[layout]], JOB.flags())
    assert_resumed(ended, JOB, first)


def test_a_longer_run_goes_on_from_a_finished_one(warm_ground: Ground, tmp_path: Path) -> None:
    folder = tmp_path / "saved"
    short, long = TinyOptions(steps=10), TinyOptions(steps=14)
    assert warm_ground.run([*saving(folder), *TWO_BY_TWO], short.flags()).exit_code == 0
    assert newest(folder) == 10
    refused = warm_ground.run([*saving(folder), "--resume=never", *TWO_BY_TWO], long.flags())
    assert refused.exit_code == 93
    ended = warm_ground.run(["--standalone", f"--resume={folder / 'step_10'}", *OTHERS["4x1"]], long.flags())
    assert_resumed(ended, long, 10)


def test_another_job_is_refused(warm_ground: Ground, tmp_path: Path) -> None:
    folder = tmp_path / "saved"
    assert warm_ground.run([*saving(folder), *TWO_BY_TWO], TinyOptions(steps=6).flags()).exit_code == 0
    other = TinyOptions(steps=12, layers=6)
    refused = warm_ground.run([*saving(folder), *TWO_BY_TWO], other.flags())
    assert refused.exit_code == 93, refused.story()
    assert "Traceback" not in refused.err


def test_the_job_goes_back_to_its_checkpoint_when_state_is_lost(warm_ground: Ground, tmp_path: Path) -> None:
    job = TinyOptions(steps=20)
    kills = [f"--inject=kill:worker={worker},step=12,phase=forward" for worker in (1, 2, 3)]
    flags = [*saving(tmp_path / "saved"), *OTHERS["4x1"], "--max-restarts=4", *kills]
    ended = warm_ground.run(flags, job.flags())
    assert ended.exit_code == 0, ended.story()
    report, wanted = ended.need_report(), oracle(job)
    assert report.losses == wanted.losses, report.text
    assert report.digest == wanted.digest, report.text


@pytest.mark.parametrize("each", [2, 1])
def test_the_node_of_a_dead_agent_is_not_waited_for_where_nobody_starts_it_again(
    warm_ground: Ground, tmp_path: Path, each: int
) -> None:
    """All workers of the other node are lost after it: the layout starts on what is left, or the job ends."""
    job = TinyOptions(steps=20)
    spares = 2 * each - 2
    layout = ["--nnodes=2", f"--nproc-per-node={each}", "--dp=2", "--pp=1", f"--spares={spares}"]
    kills = [f"--inject=kill:worker={worker},step=14,phase=forward" for worker in range(each)]
    running = warm_ground.start([*saving(tmp_path / "saved"), *layout, *kills], [*job.flags(), "--print-steps=1"])
    running.wait_line("tiny step 5$")
    running.one("elaswave_agent", "--node=node1").kill()
    ended = running.wait()
    warm_ground.check_nothing_left()
    assert ended.seconds < 60.0, ended.story()
    if each == 2:
        assert_same_training(ended, job)
        return
    assert ended.exit_code == 1, ended.story()
    assert "the nodes that are left have 1 of the 2 workers of the layout" in ended.err, ended.story()
