"""However a job ends: the right exit code, one clear message, and nothing stays."""

import os
import signal
import time
from pathlib import Path

import pytest
from harness import Ended, Ground, assert_same_training, oracle
from tiny_job import TinyOptions

GRID = ["--standalone", "--nproc-per-node=4", "--dp=2", "--pp=2"]
ENDLESS = TinyOptions(steps=100_000)
END_LIMIT_S = 5.0

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_everything_within_five_seconds(ground: Ground, number: signal.Signals) -> None:
    job = ground.start(GRID, [*ENDLESS.flags(), "--print-steps=1"])
    job.wait_line("tiny step 3$")
    sent_at = time.monotonic()
    os.kill(job.process.pid, number)
    ended = job.wait()
    assert ended.exit_code == 128 + number, ended.story()
    ground.check_nothing_left()
    assert time.monotonic() - sent_at <= END_LIMIT_S, ended.story()
    report = ended.need_report()
    assert report.exit_code == 1
    assert report.steps >= 4
    assert report.losses[:4] == oracle(TinyOptions(steps=4)).losses


def test_a_stopped_worker_does_not_keep_the_end_waiting(warm_ground: Ground) -> None:
    job = warm_ground.start(
        [*GRID, "--inject=stop:worker=3,step=2,phase=forward"], [*ENDLESS.flags(), "--print-steps=1"]
    )
    job.wait_line("incident: stopped, worker 3")
    sent_at = time.monotonic()
    os.kill(job.process.pid, signal.SIGTERM)
    ended = job.wait()
    assert ended.exit_code == 128 + signal.SIGTERM, ended.story()
    warm_ground.check_nothing_left()
    assert time.monotonic() - sent_at <= END_LIMIT_S, ended.story()


def test_kill_of_the_launcher_ends_everything(ground: Ground) -> None:
    job = ground.start(GRID, [*ENDLESS.flags(), "--print-steps=1"])
    job.wait_line("tiny step 3$")
    job.process.kill()
    ended = job.wait()
    assert ended.exit_code == -signal.SIGKILL
    ground.check_nothing_left(killed=True)
    # Its run folder is the next launcher's to remove.
    again = TinyOptions(steps=2)
    assert_same_training(ground.run(GRID, again.flags()), again)


@pytest.mark.parametrize("module", ["elaswave_controller", "elaswave.runtime.zygote", "elaswave_agent"])
def test_the_death_of_a_process_that_all_need_ends_the_job(ground: Ground, module: str) -> None:
    job = ground.start(GRID, [*ENDLESS.flags(), "--print-steps=1"])
    job.wait_line("tiny step 3$")
    job.one(module).kill()
    ended = job.wait()
    ground.check_nothing_left()
    assert ended.exit_code == 1, ended.story()
    assert "elaswave-launch: " in ended.err
    assert "Traceback" not in ended.err


@pytest.mark.parametrize(
    ("place", "text"),
    [
        ("start", "ValueError: the script is broken"),
        ("data", "ValueError: sample [0-9]+ is broken"),
        ("layer", "ValueError: the layer is broken"),
        ("loss", "ValueError: the loss is broken"),
        ("on_step", "ValueError: on_step is broken at step 0"),
    ],
)
def test_code_of_the_user_that_raises_is_shown_once(warm_ground: Ground, place: str, text: str) -> None:
    ended = warm_ground.run(GRID, [*TinyOptions(steps=200).flags(), f"--raise-at={place}"])
    assert ended.exit_code == 1, ended.story()
    head = text.split("[", maxsplit=1)[0]
    lines = [line for line in ended.err.splitlines() if line.strip().startswith(head)]
    assert len(lines) == 1, ended.story()
    assert ended.err.count("Traceback (most recent call last)") == 1, ended.story()
    assert "tiny_job.py" in ended.err
    assert "worker " in ended.err


def poisoned(policy: str) -> TinyOptions:
    # Within so many steps some samples are poisoned, in this order of samples.
    return TinyOptions(steps=12, poison=1, non_finite="skip-step" if policy == "skip-step" else "raise")


def test_values_that_are_not_finite_end_the_job(warm_ground: Ground) -> None:
    first = oracle(poisoned("skip-step")).skipped_steps[0]
    ended = warm_ground.run(GRID, poisoned("raise").flags())
    assert ended.exit_code == 1, ended.story()
    line = next(line for line in ended.err.splitlines() if line.startswith("elaswave-launch: "))
    assert f"step {first}" in line
    assert "micro-batch " in line
    assert "layer 0" in line
    assert "Traceback" not in ended.err, ended.story()


@pytest.mark.parametrize("failure", [[], ["--inject=kill:worker=1,step=3,phase=backward"]], ids=["none", "kill"])
def test_steps_whose_values_are_not_finite_are_skipped(warm_ground: Ground, failure: list[str]) -> None:
    job = poisoned("skip-step")
    wanted = oracle(job)
    assert 0 < len(wanted.skipped_steps) < job.steps
    ended = warm_ground.run([*GRID, *failure], job.flags())
    assert_same_training(ended, job)
    assert ended.need_report().skipped_steps == wanted.skipped_steps


REFUSED = {
    "more-stages-than-layers": (["--nproc-per-node=8", "--pp=8"], [], "--pp"),
    "batch-smaller-than-dp": (["--nproc-per-node=4", "--dp=4"], ["--global-batch=2"], "--dp 4"),
    "indivisible-batch": (["--nproc-per-node=2"], ["--micro-batch=3"], "8 is not divisible by micro_batch 3"),
    "more-batch-than-data": (["--nproc-per-node=2"], ["--global-batch=6000"], "Job.data has 5000 samples"),
    "no-such-seed": (["--nproc-per-node=2"], ["--seed=-1"], "Job.seed is -1"),
    "more-replicas-than-workers": (["--nproc-per-node=2", "--replicas=2"], [], "--replicas is 2 with 2 workers"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_fit_is_refused_before_the_first_step(warm_ground: Ground, name: str) -> None:
    flags, script_flags, text = REFUSED[name]
    ended = warm_ground.run(["--standalone", *flags], script_flags)
    check_refused(ended, text)


def check_refused(ended: Ended, text: str) -> None:
    assert ended.exit_code == 93, ended.story()
    lines = [line for line in ended.err.splitlines() if line.startswith("elaswave-launch: ")]
    assert len(lines) == 1, ended.story()
    assert text in lines[0], ended.story()
    assert "Traceback" not in ended.err, ended.story()
    assert ended.report is None


def test_state_without_copies_ends_the_job(warm_ground: Ground) -> None:
    kills = [f"--inject=kill:worker={worker},step=2,phase=forward" for worker in (1, 2, 3)]
    ended = warm_ground.run(
        ["--standalone", "--nproc-per-node=4", "--dp=4", "--replicas=1", *kills], TinyOptions().flags()
    )
    assert ended.exit_code == 1, ended.story()
    assert "there is no durable checkpoint: use --save-every and --save-dir" in ended.err, ended.story()


def test_the_loss_of_all_workers_ends_the_job(warm_ground: Ground) -> None:
    kills = [f"--inject=kill:worker={worker},step=2,phase=forward" for worker in (0, 1)]
    ended = warm_ground.run(["--standalone", "--nproc-per-node=2", "--dp=2", *kills], TinyOptions().flags())
    assert ended.exit_code == 1, ended.story()
    assert "lost" in ended.err, ended.story()


def test_the_loss_of_all_workers_sends_the_job_back_to_its_checkpoint(warm_ground: Ground, tmp_path: Path) -> None:
    options = TinyOptions(steps=5)
    kills = [f"--inject=kill:worker={worker},step=3,phase=forward" for worker in (0, 1)]
    saves = ("--save-every=2", f"--save-dir={tmp_path / 'saved'}")
    ended = warm_ground.run(["--standalone", "--nproc-per-node=2", "--dp=2", *kills, *saves], options.flags())
    assert_same_training(ended, options)
    assert [found.cause for found in ended.need_report().incidents][-1] == "restart"
