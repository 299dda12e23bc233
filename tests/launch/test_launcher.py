"""elaswave-launch with real controllers, agents and workers; the scripts do not train, so that a run takes a second."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator

import psutil
import pytest
from launch_harness import LIMIT_S, Place, all_gone, family, popen, run

from elaswave_launch.operator import operate

TWO_NODES = ("--standalone", "--nnodes", "2", "--nproc-per-node", "2", "--start", "spawn")
WAITS = """
import os, signal
print("ready", os.getpid(), flush=True)
signal.pause()
"""
IGNORES_SIGTERM = """
import os, signal
signal.signal(signal.SIGTERM, signal.SIG_IGN)
print("ready", os.getpid(), flush=True)
while True:
    signal.pause()
"""


@contextlib.contextmanager
def running(place: Place, script: str, *flags: str) -> Iterator[subprocess.Popen[str]]:
    """A job whose worker of rank 0 has printed "ready"."""
    process = popen(place, *TWO_NODES, *flags, place.script(script))
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line.startswith("ready"), line + ("" if process.stderr is None else process.stderr.read())
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        process.communicate(timeout=LIMIT_S)


def end(process: subprocess.Popen[str]) -> tuple[int, str]:
    """Exit code and stderr."""
    _, err = process.communicate(timeout=LIMIT_S)
    return process.returncode, err


def find(members: list[psutil.Process], module: str) -> list[psutil.Process]:
    return [member for member in members if module in member.cmdline()]


# ------------------------------------------------------------------ scripts


def test_a_script_that_raises_is_shown_once_with_its_worker(place: Place) -> None:
    done = run(place, *TWO_NODES, place.script("def broken():\n    raise ValueError('no such thing')\n\nbroken()\n"))
    assert done.returncode == 1
    assert done.stderr.count("Traceback (most recent call last)") == 1
    assert done.stderr.count("ValueError: no such thing\n") in (1, 2), "the summary and the traceback's last line"
    assert "elaswave-launch: worker" in done.stderr
    assert 'script.py", line 2, in broken' in done.stderr
    assert done.stdout == ""
    assert place.run_folders == []


def test_a_script_that_ends_without_training_is_an_error(place: Place) -> None:
    done = run(place, *TWO_NODES, place.script("print('nothing to do')"))
    assert done.returncode == 1
    assert "ended with exit code 0 before the first step" in done.stderr


def test_a_crash_in_native_code_is_explained_by_the_workers_last_lines(place: Place) -> None:
    done = run(place, *TWO_NODES, place.script("import os, signal\nos.kill(os.getpid(), signal.SIGSEGV)"))
    assert done.returncode == 1
    assert "Fatal Python error: Segmentation fault" in done.stderr
    assert "last lines of node" in done.stderr


def test_workers_get_torchruns_environment_arguments_and_log_files(place: Place) -> None:
    script = """
import json, os, sys
names = [name for name in os.environ if name.startswith(("RANK", "LOCAL_", "WORLD_", "GROUP_", "MASTER_", "TORCHE"))]
with open(f"environment{os.environ['RANK']}.json", "w") as file:
    json.dump({"arguments": sys.argv[1:], **{name: os.environ[name] for name in names}}, file)
print("out of", os.environ["RANK"], flush=True)
print("err of", os.environ["RANK"], file=sys.stderr, flush=True)
while not all(os.path.exists(f"environment{rank}.json") for rank in range(4)):
    pass
"""
    (place.work / "pkg").mkdir()
    (place.work / "pkg" / "main.py").write_text(script)
    flags = ("--rdzv-id", "named", "--log-dir", "logs", "--local-ranks-filter", "0,3", "--max-restarts", "7")
    done = run(place, *TWO_NODES, *flags, "-m", "pkg.main", "--lr", "3")
    found = [json.loads((place.work / f"environment{rank}.json").read_text()) for rank in range(4)]
    for rank, values in enumerate(found):
        assert values["arguments"] == ["--lr", "3"]
        assert (values["RANK"], values["WORLD_SIZE"]) == (str(rank), "4")
        assert (values["LOCAL_RANK"], values["LOCAL_WORLD_SIZE"]) == (str(rank % 2), "2")
        assert (values["GROUP_RANK"], values["GROUP_WORLD_SIZE"]) == (str(rank // 2), "2")
        assert (values["TORCHELASTIC_RUN_ID"], values["TORCHELASTIC_MAX_RESTARTS"]) == ("named", "7")
        assert values["MASTER_ADDR"] == "127.0.0.1"
        logs = place.work / "logs" / "named" / f"node{rank // 2}"
        assert (logs / f"rank_{rank}.out").read_text() == f"out of {rank}\n"
        assert f"err of {rank}\n" in (logs / f"rank_{rank}.err").read_text()
    assert sorted(done.stdout.splitlines()) == ["[rank 0] out of 0", "[rank 3] out of 3"]


# ------------------------------------------------------------------ endings


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_everything(place: Place, number: signal.Signals) -> None:
    report = place.work / "report.json"
    with running(place, WAITS, "--report", str(report)) as process:
        members = family(process.pid)
        assert len(members) == 1 + 1 + 2 + 4, "launcher, controller, agents, workers"
        began = time.monotonic()
        process.send_signal(number)
        code, err = end(process)
        assert time.monotonic() - began < 5.0
        assert code == 128 + number
        assert f"ended by {number.name}" in err
        assert all_gone(members, 0.5)
    assert place.run_folders == []
    content = json.loads(report.read_text())
    assert (content["exit_code"], content["steps"]) == (1, 0)


def test_workers_that_ignore_sigterm_end_in_time(place: Place) -> None:
    with running(place, IGNORES_SIGTERM) as process:
        members = family(process.pid)
        began = time.monotonic()
        process.terminate()
        assert end(process)[0] == 128 + signal.SIGTERM
        assert time.monotonic() - began < 5.0
        assert all_gone(members, 0.5)


def test_stopped_children_do_not_hold_up_the_end(place: Place) -> None:
    with running(place, WAITS) as process:
        members = family(process.pid)
        for child in find(members, "elaswave_controller") + find(members, "elaswave_agent"):
            child.suspend()
        began = time.monotonic()
        process.terminate()
        assert end(process)[0] == 128 + signal.SIGTERM
        assert time.monotonic() - began < 8.0
        assert all_gone(members, 0.5)


def test_a_second_signal_ends_the_patience(place: Place) -> None:
    with running(place, IGNORES_SIGTERM, "--shutdown-timeout", "60") as process:
        members = family(process.pid)
        for child in find(members, "elaswave_controller"):
            child.suspend()
        process.send_signal(signal.SIGINT)
        assert process.stderr is not None
        assert process.stderr.readline() == "SIGINT: ending the job\n"
        process.send_signal(signal.SIGINT)
        assert end(process)[0] == 128 + signal.SIGINT
        assert all_gone(members, 0.5)


def test_who_waits_for_the_controller_is_told_so_and_can_be_interrupted(place: Place) -> None:
    token = place.script("t" * 32, "token")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        where = ("--rdzv-endpoint", f"127.0.0.1:{taken.getsockname()[1]}", "--rdzv-id", "x", "--token-file", token)
        taken.close()
        flags = ("--nnodes", "2", "--node-rank", "1", "--start", "spawn", *where)
        process = popen(place, *flags, place.script(WAITS))
    members = family(process.pid)
    assert process.stderr is not None
    assert process.stderr.readline().startswith("waiting for the controller at 127.0.0.1:")
    process.send_signal(signal.SIGINT)
    assert end(process)[0] == 128 + signal.SIGINT
    assert all_gone(members, 0.5)


def test_kill_minus_nine_of_the_launcher_leaves_no_process(place: Place) -> None:
    with running(place, IGNORES_SIGTERM, "--rdzv-id", "killed") as process:
        members = family(process.pid)
        process.kill()
        process.wait(timeout=LIMIT_S)
        assert all_gone(members, 5.0)
    assert [path.name for path in place.run_folders] == ["killed"]
    assert run(place, *TWO_NODES, place.script("raise SystemExit(3)")).returncode == 1
    assert place.run_folders == [], "the next launcher has cleaned up"


def test_kill_minus_nine_of_the_controller_ends_the_job(place: Place) -> None:
    with running(place, WAITS) as process:
        members = family(process.pid)
        [controller] = find(members, "elaswave_controller")
        controller.kill()
        code, err = end(process)
        assert code == 1
        assert "controller was killed by SIGKILL" in err
        assert all_gone(members, 0.5)


def test_kill_minus_nine_of_all_agents_ends_the_job(place: Place) -> None:
    with running(place, WAITS) as process:
        members = family(process.pid)
        for agent in find(members, "elaswave_agent"):
            agent.kill()
        code, _ = end(process)
        assert code == 1
        assert all_gone(members, 5.0)


def test_no_shared_memory_stays(place: Place) -> None:
    before = set(os.listdir("/dev/shm"))
    with running(place, WAITS) as process:
        process.kill()
        process.wait(timeout=LIMIT_S)
    assert {name for name in set(os.listdir("/dev/shm")) - before if "elaswave" in name} == set()


# ------------------------------------------------------------------ operators


def test_operators_see_and_act_on_a_running_job(
    place: Place, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    environment = place.environment
    assert operate(["status"], environment) == 1
    assert "no job of this user is running" in capsys.readouterr().err
    with running(place, WAITS, "--rdzv-id", "one") as process:
        assert operate(["status", "--json", "--job", "one"], environment) == 0
        status = json.loads(capsys.readouterr().out)
        assert (status["job"], status["state"], status["epoch"]) == ("one", "starting", 0)
        workers = status["workers"]
        assert [(worker["worker"], worker["node"], worker["local_index"]) for worker in workers] == [
            (0, "node0", 0), (1, "node0", 1), (2, "node1", 0), (3, "node1", 1),
        ]  # fmt: skip
        pids = {member.pid for member in family(process.pid)}
        assert {worker["pid"] for worker in workers if worker["pid"]} <= pids
        assert operate(["status"], environment) == 0
        assert "job one  starting" in capsys.readouterr().out
        assert operate(["incidents", "--json"], environment) == 0
        assert json.loads(capsys.readouterr().out) == []
        assert operate(["inject", "kill", "--worker", "9"], environment) == 1
        assert "no worker 9; there are 0, 1, 2, 3" in capsys.readouterr().err
        assert operate(["status", "--job", "two"], environment) == 1
        assert "no such job is running; there are: one" in capsys.readouterr().err
        assert operate(["stop"], environment) == 0
        code, err = end(process)
        assert code == 1
        assert "stopped: elaswave stop" in err


def test_an_injected_stop_stops_the_process(place: Place) -> None:
    with running(place, WAITS) as process:
        workers = [member for member in family(process.pid) if "script.py" in member.cmdline()[-1]]
        workers = [worker for worker in workers if "elaswave_agent" not in worker.cmdline()]
        assert operate(["inject", "stop", "--worker", "0"], place.environment) == 0
        deadline = time.monotonic() + 10.0
        while not any(worker.status() == psutil.STATUS_STOPPED for worker in workers):
            assert time.monotonic() < deadline


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "the following arguments are required: COMMAND"),
        (["dance"], "invalid choice: 'dance'"),
        (["inject", "kill"], "the following arguments are required: --worker"),
        (["inject", "kill", "--worker", "x"], "--worker x: must be a whole number from 0"),
        (["inject", "kill", "--worker", "1", "--factor", "2"], "--factor 2: goes with slow only"),
        (["inject", "slow", "--worker", "1", "--factor", "x"], "--factor x: must be a number above 1"),
        (["inject", "slow", "--worker", "1", "--factor", "1"], "must be a number above 1"),
        (["inject", "kill", "--worker", "1", "--phase", "reduce"], "--phase reduce: needs --step K"),
        (["status", "--jso"], "unrecognized arguments: --jso"),
    ],
)
def test_wrong_arguments_of_operators(
    place: Place, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert operate(arguments, place.environment) == 93
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
