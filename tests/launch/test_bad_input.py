"""Bad input: exit code 93, one line that names the value and what would be right, nothing started or left behind."""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from launch_harness import Place, run

from elaswave_launch.cli import launch

ONE = ["--standalone", "--nproc-per-node", "4"]
CASES = [
    # layouts
    ([*ONE, "--dp", "3"], "--spares 0 uses 3 workers but 1 node(s) x 4 processes = 4: add --spares 1"),
    ([*ONE, "--dp", "4", "--pp", "2"], "needs 8 workers but 1 node(s) x 4 processes = 4: start more workers"),
    ([*ONE, "--dp", "4", "--spares", "1"], "--dp 4 --pp 1 --tp 1 --spares 1 needs 5 workers"),
    ([*ONE, "--pp", "3"], "4 processes less --spares 0 cannot be divided into replicas of --pp 3 x --tp 1 = 3 workers"),
    ([*ONE, "--spares", "4"], "cannot be divided"),
    ([*ONE, "--tp", "2"], "--tp 2: tensor parallelism is not supported"),
    ([*ONE, "--dp", "0"], "--dp 0: must be a whole number from 1"),
    ([*ONE, "--pp", "-1"], "--pp -1: must be a whole number from 1"),
    ([*ONE, "--dp", "two"], "--dp two: must be a whole number from 1"),
    ([*ONE, "--replicas", "-1"], "--replicas -1: must be a whole number from 0"),
    ([*ONE, "--replicas", "٣"], "--replicas ٣: must be a whole number from 0"),
    (["--nproc-per-node", "0"], "--nproc-per-node 0: must be a number from 1, cpu, gpu or auto"),
    (["--nproc-per-node", "gpu"], "--nproc-per-node gpu: this machine shows no GPU"),
    (["--nnodes", "3:1"], "--nnodes 3:1: MIN must not be above MAX"),
    (["--nnodes", "x"], "--nnodes x: must be N or MIN:MAX"),
    (["--nnodes", "4000000", "--standalone"], "--nnodes 4000000: must be at most 1048576"),
    (["--nnodes", "5000", "--standalone"], "--nnodes x --nproc-per-node on one machine 5000 x 1: must be at most 4096"),
    (["--nproc-per-node", "9" * 20], f"--nproc-per-node {'9' * 20}: must be at most 4096"),
    (["--nnodes", "2"], "--nnodes 2 needs --rdzv-endpoint HOST:PORT and --node-rank, or --standalone"),
    # flags
    ([*ONE, "--nproc", "2"], "unknown flag --nproc"),
    ([*ONE, "--no-python"], "--no-python is not supported: workers run Python scripts"),
    ([*ONE, "--max-restarts", "many"], "--max-restarts many: must be a whole number from 0"),
    ([*ONE, "--log-cap", "1T"], "--log-cap 1T: must be bytes, as 500000, 64M or 2G"),
    ([*ONE, "--start", "thread"], "--start thread: must be fork or spawn"),
    ([*ONE, "--link-transport", "rdma"], "--link-transport rdma: must be shared or unix or tcp"),
    ([*ONE, "--reduce", "tree"], "--reduce tree: must be direct or ring"),
    ([*ONE, "--node-suspect-s", "0"], "--node-suspect-s 0: must be seconds from 0.3"),
    ([*ONE, "--node-suspect-s", "nan"], "--node-suspect-s nan: must be seconds from 0.3"),
    ([*ONE, "--shutdown-timeout", "inf"], "--shutdown-timeout inf: must be seconds from 0"),
    ([*ONE, "--rdzv-id", "../x"], "--rdzv-id '../x': must be 1 to 64 letters"),
    ([*ONE, "--rdzv-backend", "etcd"], "--rdzv-backend etcd: must be c10d or static"),
    ([*ONE, "--local-ranks-filter", "a"], "--local-ranks-filter a: must be ranks from 0"),
    (["--local-ranks-filter", "0,7"], "--local-ranks-filter 0,7: must be ranks from 0 to 0, separated by commas"),
    (["--node-rank", "1"], "--node-rank 1: must be below --nnodes 1"),
    ([*ONE, "--signals-to-handle", "SIGKILL"], "--signals-to-handle SIGKILL: must be names of signals that"),
    # injections
    ([*ONE, "--inject", "explode:worker=1,step=2"], "--inject explode:worker=1,step=2: must start with kill:, stop:"),
    ([*ONE, "--inject", "kill:worker=1"], "--inject kill:worker=1: step=… is missing"),
    ([*ONE, "--inject", "kill:worker=1,step=x"], "step=x must be a whole number from 0"),
    ([*ONE, "--inject", "kill:worker=1,step=2,phase=lunch"], "phase=lunch must be one of forward, backward"),
    ([*ONE, "--inject", "slow:worker=1,step=2,factor=0.5"], "factor=0.5 must be a number above 1"),
    ([*ONE, "--inject", "kill:worker=4,step=2"], "--inject kill:worker=4,step=2: worker=4 must be below 4"),
    # checkpoints
    ([*ONE, "--save-every", "5"], "--save-every 5 needs --save-dir DIR"),
    ([*ONE, "--resume", "x" * 300], "File name too long; give another path"),
    ([*ONE, "--report", "x" * 300], "File name too long; give another path"),
    ([*ONE, "--resume", ""], "--resume '': must be auto, never or the path of a checkpoint"),
    ([*ONE, "--resume", "missing"], "--resume missing: no checkpoint.json there"),
    ([*ONE, "--fresh"], "--fresh says something about --save-dir, which is not given"),
    ([*ONE, "--resume", "never", "--save-dir", "history"], "history already holds step_8; add --fresh"),
    ([*ONE, "--save-dir", "damaged"], "step_8/checkpoint.json cannot be read"),
    ([*ONE, "--resume", "damaged"], "step_8/checkpoint.json cannot be read"),
    ([*ONE, "--resume", "history", "--fresh"], "--fresh contradicts --resume history"),
    # files
    ([*ONE, "--report", "missing/report.json"], "missing/report.json: the folder"),
    ([*ONE, "--report", "history"], "history: is a folder; give the path of a file"),
    ([*ONE, "--report", ""], "--report '': must be a path"),
    ([*ONE, "--report", "/proc/report.json"], "--report /proc/report.json: cannot write in /proc"),
    ([*ONE, "--log-dir", "script.py/logs"], "script.py is not a folder"),
    ([*ONE, "--log-dir", "/proc/x"], "--log-dir /proc/x: cannot write in /proc"),
    ([*ONE, "--save-dir", "/proc/x/y"], "--save-dir /proc/x/y: cannot write in /proc"),
    ([*ONE, "--shard-elements", "0"], "--shard-elements 0: must be a whole number from 1"),
    ([*ONE, "--zygote", "missing"], "missing: nothing answers there ([Errno 2] No such file or directory)"),
    ([*ONE, "--zygote", "script.py"], "script.py: nothing answers there ([Errno 111] Connection refused)"),
    ([*ONE, "--zygote", "z", "--start", "spawn"], "forks workers, --start spawn does not"),
    ([*ONE, "--token-file", "missing"], "missing: cannot be read"),
    ([*ONE, "--token-file", "script.py"], "must hold at least 16 printable characters"),
    # endpoints
    (["--rdzv-endpoint", "localhost:99999"], "endpoint localhost:99999: must be HOST:PORT with a port from 0 to 65535"),
    (["--plaintext", "--rdzv-endpoint", "no.such.host.invalid:1"], "endpoint no.such.host.invalid:1: cannot resolve"),
    (["--rdzv-endpoint", "192.0.2.1:4000"], "192.0.2.1 can be reached from other machines: set ELASWAVE"),
    ([*ONE, "--local-addr", "192.0.2.1"], "192.0.2.1 can be reached from other machines"),
    (["--plaintext", "--rdzv-endpoint", "192.0.2.1:4000"], "endpoint 192.0.2.1:4000: cannot listen there (Cannot"),
    (["--nnodes", "2", "--node-rank", "2", "--master-addr", "h"], "--node-rank 2: must be below --nnodes 2"),
    (["--nnodes", "2", "--master-addr", "h"], "a job on several nodes needs --rdzv-id NAME"),
    (["--nnodes", "2", "--master-addr", "localhost", "--rdzv-id", "x"], "needs a secret that all nodes share"),
    (["--nnodes", "2", "--master-addr", "h", "--master-port", "0"], "endpoint h:0: nodes find each other by the port"),
]  # fmt: skip


@pytest.fixture
def folder(place: Place, monkeypatch: pytest.MonkeyPatch) -> Place:
    """A working folder with a script, a history of checkpoints and a damaged one."""
    place.script("raise SystemExit('must not run')\n")
    for name, index in (("history", json.dumps({"step": 8})), ("damaged", "{")):
        step = place.work / name / "step_8"
        step.mkdir(parents=True)
        (step / "checkpoint.json").write_text(index)
    monkeypatch.chdir(place.work)
    return place


def snapshot(place: Place) -> set[Path]:
    return {*place.work.rglob("*"), *place.runtime.rglob("*")} - {place.runtime / f"elaswave-{os.getuid()}"}


@pytest.mark.parametrize(("arguments", "message"), CASES, ids=[" ".join(arguments)[-60:] for arguments, _ in CASES])
def test_refused(folder: Place, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str) -> None:
    before = snapshot(folder)
    assert launch([*arguments, "script.py"], folder.environment) == 93
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("elaswave-launch: ")
    assert captured.err.count("\n") == 1
    assert message in captured.err
    assert snapshot(folder) == before


@pytest.mark.parametrize(
    ("script", "message"),
    [
        (["missing.py"], "script missing.py does not exist: give the path of a Python file, or -m MODULE"),
        (["history"], "script history is a folder"),
        ([""], "SCRIPT is empty: give the path of a Python file, or -m MODULE"),
        (["-m", ""], "SCRIPT is empty: give the path of a Python file, or -m MODULE"),
        (["-m", "no_such_module.train"], "module no_such_module.train: there is no module 'no_such_module'"),
        ([], "the following arguments are required: SCRIPT"),
    ],
)
def test_missing_scripts(folder: Place, capsys: pytest.CaptureFixture[str], script: list[str], message: str) -> None:
    assert launch([*ONE, *script], folder.environment) == 93
    assert message in capsys.readouterr().err


def test_a_script_that_cannot_be_read_is_refused(folder: Place, capsys: pytest.CaptureFixture[str]) -> None:
    if os.getuid() == 0:
        pytest.skip("root reads everything")
    Path("script.py").chmod(0)
    assert launch([*ONE, "script.py"], folder.environment) == 93
    assert "script script.py cannot be read: Permission denied" in capsys.readouterr().err


@contextmanager
def listening(**options: int) -> Iterator[int]:
    with socket.socket() as server:
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, options.get("reuse", 0))
        server.bind(("127.0.0.1", 0))
        server.listen()
        yield server.getsockname()[1]


@pytest.mark.parametrize("reuse", [0, 1])
def test_a_port_in_use_is_refused(folder: Place, capsys: pytest.CaptureFixture[str], reuse: int) -> None:
    with listening(reuse=reuse) as port:
        assert launch(["--rdzv-endpoint", f"127.0.0.1:{port}", "script.py"], folder.environment) == 93
    error = capsys.readouterr().err
    assert f"endpoint 127.0.0.1:{port}: cannot listen there (Address already in use); choose another port" in error


def test_refused_as_a_process(folder: Place) -> None:
    before = snapshot(folder)
    done = run(folder, *ONE, "--dp", "3", "script.py")
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (93, "", 1)
    assert "Traceback" not in done.stderr
    assert snapshot(folder) == before


def test_a_port_taken_after_the_launcher_has_looked_is_refused_by_the_controller(folder: Place) -> None:
    before = snapshot(folder)
    with listening() as port:
        arguments = [
            "--job=j", "--host=127.0.0.1", "--run-dir=.", "--token-file=script.py", "--dp=1", "--pp=1", "--tp=1",
            "--spares=0", "--nnodes=1", "--nproc-per-node=1", "--max-restarts=0", "--replicas=1", "--save-every=0",
            "--shard-elements=1",
            f"--port={port}",
        ]  # fmt: skip
        command = [sys.executable, "-m", "elaswave_controller", *arguments]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 93
    assert f"elaswave controller: endpoint 127.0.0.1:{port}: cannot listen there" in done.stderr
    assert "Traceback" not in done.stderr
    assert snapshot(folder) == before


def test_damaged_name_of_the_newest_checkpoint(folder: Place, capsys: pytest.CaptureFixture[str]) -> None:
    (folder.work / "history" / "latest").write_bytes(b"\xff\xfe")
    assert launch([*ONE, "--resume", "history", "script.py"], folder.environment) == 93
    assert "latest cannot be read" in capsys.readouterr().err
