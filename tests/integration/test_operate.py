"""The `elaswave` command on a running job: status, incidents, inject, stop."""

import json

import psutil
import pytest
from harness import Ground, Job, assert_same_training, oracle
from tiny_job import TinyOptions

from held_end import held_end

GRID = ["--standalone", "--nproc-per-node=6", "--dp=3", "--pp=2", "--replicas=2"]
ENDLESS = TinyOptions(steps=100_000)
COMPARED_STEPS = 100
WORKER_FIELDS = {"worker", "pid", "node", "local_index", "incarnation", "state", "step", "layers"}

pytestmark = pytest.mark.slow


def start(ground: Ground) -> Job:
    job = ground.start(GRID, [*ENDLESS.flags(), "--print-steps=1"])
    job.wait_line("tiny step 2$")
    return job


def status(ground: Ground) -> dict[str, object]:
    done = ground.operate("status", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert isinstance(found, dict)
    return found


def workers_of(found: dict[str, object]) -> dict[int, dict[str, object]]:
    workers = found["workers"]
    assert isinstance(workers, list)
    return {worker["worker"]: worker for worker in workers}


def test_status_names_every_worker(ground: Ground) -> None:
    job = start(ground)
    found = status(ground)
    assert found["state"] == "training"
    assert found["epoch"] == 1
    assert found["steps"] == ENDLESS.steps
    assert isinstance(found["step"], int)
    assert found["step"] >= 2
    workers = workers_of(found)
    assert sorted(workers) == list(range(6))
    family = {process.pid for process in job.family()}
    for worker, seen in workers.items():
        assert set(seen) == WORKER_FIELDS
        assert seen["pid"] in family
        assert (seen["node"], seen["local_index"], seen["incarnation"]) == ("node0", worker, 0)
        assert seen["layers"] == ([0, 1, 2, 3] if worker % 2 == 0 else [4, 5, 6])
    text = ground.operate("status").stdout
    assert len(text.splitlines()) == 2 + len(workers)
    assert ground.operate("stop").returncode == 0
    ended = job.wait()
    assert ended.exit_code == 1, ended.story()
    ground.check_nothing_left()
    assert ground.operate("status").returncode == 1


def test_faults_injected_from_outside(ground: Ground) -> None:
    job = start(ground)
    stopped = psutil.Process(int(str(workers_of(status(ground))[4]["pid"])))
    assert ground.operate("inject", "kill", "--worker", "1").returncode == 0
    job.wait_line("incident: killed, worker 1")
    assert ground.operate("inject", "stop", "--worker", "4").returncode == 0
    job.wait_line("incident: stopped, worker 4")
    assert stopped.status() == psutil.STATUS_STOPPED
    refused = ground.operate("inject", "kill", "--worker", "77")
    assert refused.returncode == 1
    assert "77" in refused.stderr
    found = status(ground)
    workers = workers_of(found)
    assert (workers[1]["state"], workers[1]["layers"]) == ("gone", [])
    assert (workers[4]["state"], workers[4]["layers"]) == ("suspected", [])
    incidents = json.loads(ground.operate("incidents", "--json").stdout)
    assert [(seen["cause"], seen["workers"]) for seen in incidents] == [("killed", [1]), ("stopped", [4])]
    stopped.resume()
    job.wait_line("incident: join, worker 4")
    assert ground.operate("stop").returncode == 0
    ended = job.wait()
    ground.check_nothing_left()
    report = ended.need_report()
    compared = min(report.steps, COMPARED_STEPS)
    assert report.losses[:compared] == oracle(TinyOptions(steps=compared)).losses
    assert [found.cause for found in report.incidents] == ["killed", "stopped", "join"]


def test_a_killed_worker_is_replaced_only_when_the_kernel_has_ended_it(ground: Ground) -> None:
    """Its work moves at once, whatever memory it leaves; a new process needs that memory."""
    options = TinyOptions(steps=60)
    job = ground.start([*GRID, "--max-restarts=1"], [*options.flags(), "--print-steps=1"])
    job.wait_line("tiny step 2$")
    pid = int(str(workers_of(status(ground))[1]["pid"]))
    with held_end(pid):
        psutil.Process(pid).kill()
        job.wait_line("incident: killed, worker 1")
        job.wait_line(r"step \d+/60 .* 5 workers")
        assert max(workers_of(status(ground))) == 5
    job.wait_line("incident: join, worker 6")
    ended = job.wait()
    ground.check_nothing_left()
    assert_same_training(ended, options)
    assert [found.cause for found in ended.need_report().incidents] == ["killed", "join"]


def test_wrong_arguments_are_refused(ground: Ground) -> None:
    for arguments in (["inject", "kill"], ["inject", "kill", "--worker", "x"], ["status", "--job"], ["walk"]):
        assert ground.operate(*arguments).returncode == 93
    assert ground.operate("status").returncode == 1
