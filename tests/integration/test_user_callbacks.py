"""Callbacks, declared state and evaluations of real jobs, while who runs them is lost or stopped for a while."""

import re
import signal
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import pytest
from callback_job import EVALUATE_EVERY, make_callback_job
from harness import Ended, Ground, assert_same_training
from tiny_job import TinyOptions

from elaswave.runtime.reference import train_reference

SCRIPT = Path(__file__).with_name("callback_job.py")
OPTIONS = TinyOptions(steps=20)
STEP = 5
"""After it an evaluation is due."""

pytestmark = pytest.mark.slow


@cache
def undisturbed_lines() -> dict[str, str]:
    """What the callbacks of an undisturbed run say: the digest for each "chain STEP" and "evaluated STEP"."""
    return by_step(train_reference(make_callback_job(OPTIONS)).lines)


def by_step(lines: Sequence[str]) -> dict[str, str]:
    """Each step's digest; fails where two lines of one step differ."""
    found: dict[str, str] = {}
    for line in lines:
        what, digest = line.rsplit(" ", 1)
        assert found.setdefault(what, digest) == digest, line
    return found


def check_callbacks(ended: Ended, *, left_out: bool) -> None:
    """Every step was noted with the state of the steps before; every evaluation was right, or said to be left out."""
    assert_same_training(ended, OPTIONS)
    wanted = undisturbed_lines()
    found = by_step(re.findall(r"^(?:chain|evaluated) \d+ \w+$", ended.err, re.MULTILINE))
    assert found.items() <= wanted.items(), ended.story()
    missing = wanted.keys() - found.keys()
    assert missing <= ({f"evaluated {STEP}"} if left_out else set()), ended.story()


@pytest.mark.parametrize("phase", ["decide", "publish"])
def test_the_caller_is_stopped_and_comes_back(warm_ground: Ground, phase: str) -> None:
    """It has an evaluation to make of parameters that nobody has any more, and the state of a step long gone."""
    assert (STEP + 1) % EVALUATE_EVERY == 0
    flags = ["--standalone", "--nproc-per-node=4", "--dp=2", "--pp=2"]
    stop = f"--inject=stop:worker=0,step={STEP},phase={phase}"
    job = warm_ground.start([*flags, stop], OPTIONS.flags(), script=SCRIPT)
    job.wait_line(f"^chain {STEP + 2} ")
    stopped = [process for process in warm_ground.processes() if process.status() == "stopped"]
    assert len(stopped) == 1
    stopped[0].send_signal(signal.SIGCONT)
    check_callbacks(job.wait(), left_out=True)
    warm_ground.check_nothing_left()


def test_the_node_of_the_caller_is_lost(warm_ground: Ground) -> None:
    """The other copy of the state is on the other node."""
    flags = ["--standalone", "--nnodes=2", "--nproc-per-node=2", "--dp=2", "--pp=2"]
    kills = [f"--inject=kill:worker={worker},step={STEP},phase=decide" for worker in (0, 1)]
    ended = warm_ground.start([*flags, *kills], OPTIONS.flags(), script=SCRIPT).wait()
    check_callbacks(ended, left_out=True)
    warm_ground.check_nothing_left()


def test_callers_are_lost_one_after_the_other_and_start_again(warm_ground: Ground) -> None:
    flags = ["--standalone", "--nproc-per-node=4", "--dp=2", "--pp=2", "--max-restarts=2"]
    kills = [f"--inject=kill:worker={worker},step={STEP + worker},phase=backward" for worker in (0, 1, 2)]
    ended = warm_ground.start([*flags, *kills], OPTIONS.flags(), script=SCRIPT).wait()
    check_callbacks(ended, left_out=True)
    warm_ground.check_nothing_left()


def test_the_state_of_a_durable_checkpoint_belongs_to_its_step(warm_ground: Ground) -> None:
    """All workers are lost: the job goes back to a step that it has been through, with the state of that step."""
    save = ["--save-every=4", f"--save-dir={warm_ground.work / 'saved'}"]
    flags = ["--standalone", "--nproc-per-node=4", "--dp=2", "--pp=2", "--max-restarts=1", *save]
    kills = [f"--inject=kill:worker={worker},step=11,phase=backward" for worker in range(4)]
    ended = warm_ground.start([*flags, *kills], OPTIONS.flags(), script=SCRIPT).wait()
    check_callbacks(ended, left_out=False)
    assert any(incident.cause == "restart" for incident in ended.need_report().incidents)
    warm_ground.check_nothing_left()
