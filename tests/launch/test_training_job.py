"""elaswave-launch with a job that trains: forked workers, a real controller core."""

import json
import signal
import subprocess

import psutil
import pytest
from launch_harness import LIMIT_S, Place, all_gone, family, popen, run

from elaswave_launch.operator import operate

FLAGS = ("--standalone", "--nnodes", "2", "--nproc-per-node", "2", "--pp", "2")
TRAINS = """
import sys
from functools import partial
import torch
from torch import nn
import elaswave as ew

class Data:
    def __len__(self):
        return 1000

    def __getitem__(self, index):
        return torch.randn(4), torch.randn(4)

ew.train(ew.Job(
    layers=[partial(nn.Linear, 4, 4)] * 4, loss=nn.functional.mse_loss, data=Data(), optimizer=ew.SGD(lr=0.1),
    global_batch=4, micro_batch=1, steps=int(sys.argv[1]), on_step=lambda result: f"did {result.step}",
))
"""


def wait_for_line(process: subprocess.Popen[str], text: str) -> None:
    assert process.stderr is not None
    seen = []
    for line in process.stderr:
        if text in line:
            return
        seen.append(line)
    pytest.fail(f"{text!r} was not shown: {''.join(seen)}")


def members(process: subprocess.Popen[str], module: str) -> list[psutil.Process]:
    return [member for member in family(process.pid) if module in member.cmdline()]


def test_a_job_from_its_start_to_its_report(place: Place) -> None:
    report = place.work / "report.json"
    fault = ("--inject", "kill:worker=1,step=3,phase=backward")
    done = run(place, *FLAGS, *fault, "--report", str(report), place.script(TRAINS), "8")
    assert done.returncode == 0, done.stderr
    content = json.loads(report.read_text())
    assert (content["exit_code"], content["steps"], len(content["losses"])) == (0, 8, 8)
    assert len(content["digest"]) == 64
    [incident] = [incident for incident in content["incidents"] if incident["cause"] == "killed"]
    assert (incident["workers"], incident["step"]) == ([1], 3)
    assert "step 8/8  loss " in done.stderr
    assert "incident: killed, worker 1, step 4" in done.stderr
    assert place.run_folders == []
    alone = place.work / "alone.json"
    again = run(place, "--report", str(alone), place.script(TRAINS), "8")
    assert again.returncode == 0
    shown = [line for line in again.stderr.splitlines() if line.startswith("step ")]
    assert all("/8  loss " in line and "epoch 1" in line for line in shown), "however short a job is"
    assert shown[-1].startswith("step 8/8")
    undisturbed = json.loads(alone.read_text())
    assert [content[key] for key in ("digest", "losses", "samples_digest")] == [
        undisturbed[key] for key in ("digest", "losses", "samples_digest")
    ]


def test_when_every_copy_is_gone_the_job_goes_back_to_its_checkpoint(place: Place) -> None:
    flags = ("--standalone", "--nnodes", "2", "--pp", "2", "--replicas", "0", "--inject", "kill:worker=1,step=3")
    saves = ("--save-every", "2", "--save-dir", "saved", "--report", "report.json")
    done = run(place, *flags, *saves, place.script(TRAINS), "5")
    assert done.returncode == 0, done.stderr
    content = json.loads((place.work / "report.json").read_text())
    assert (content["steps"], content["first_step"], len(content["losses"])) == (5, 0, 5)
    [restart] = [incident for incident in content["incidents"] if incident["cause"] == "restart"]
    assert restart["reason"] == f"all workers started again from {place.work / 'saved' / 'step_2'}"
    again = run(place, "--resume", "saved/step_4", "--report", "again.json", place.script(TRAINS), "5")
    assert again.returncode == 0, again.stderr
    resumed = json.loads((place.work / "again.json").read_text())
    assert (resumed["first_step"], resumed["steps"]) == (4, 5)
    assert (resumed["digest"], resumed["losses"]) == (content["digest"], content["losses"][4:])


def test_operators_see_layers_and_incidents_and_the_zygotes_death_ends_the_job(
    place: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    process = popen(place, *FLAGS, place.script(TRAINS), "1000000")
    try:
        wait_for_line(process, "did 2")
        everyone = family(process.pid)
        assert operate(["status", "--json"], place.environment) == 0
        status = json.loads(capsys.readouterr().out)
        assert status["state"] == "training"
        assert sorted(worker["layers"] for worker in status["workers"]) == [[0, 1], [0, 1], [2, 3], [2, 3]]
        assert {worker["pid"] for worker in status["workers"]} <= {member.pid for member in everyone}
        assert operate(["inject", "kill", "--worker", "3"], place.environment) == 0
        wait_for_line(process, "incident: killed, worker 3")
        assert operate(["incidents"], place.environment) == 0
        assert "incident: killed, worker 3" in capsys.readouterr().out
        [zygote] = [member for member in members(process, "elaswave.runtime.zygote") if member.ppid() == process.pid]
        zygote.kill()
        _, err = process.communicate(timeout=LIMIT_S)
        assert process.returncode == 1
        assert "zygote was killed by SIGKILL" in err
        assert all_gone(everyone, 1.0)
    finally:
        process.kill()
        process.communicate(timeout=LIMIT_S)


def test_kill_minus_nine_of_the_launcher_ends_forked_workers(place: Place) -> None:
    process = popen(place, *FLAGS, place.script(TRAINS), "1000000")
    try:
        wait_for_line(process, "did 2")
        everyone = family(process.pid)
        assert len(everyone) == 1 + 1 + 1 + 2 + 4
        process.send_signal(signal.SIGKILL)
        process.wait(timeout=LIMIT_S)
        assert all_gone(everyone, 5.0)
    finally:
        process.kill()
        process.communicate(timeout=LIMIT_S)
