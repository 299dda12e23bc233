"""Torch's own suite under our script: outcomes, what does not apply, limits, and that nothing stays behind."""

import json
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

FOLDER = Path(__file__).resolve().parent.parent / "scripts"
sys.path.append(str(FOLDER))

from distributed_cases import last_error  # noqa: E402 - the folder of the scripts is on their path only
from distributed_rules import exemption_by_name, exemption_by_text  # noqa: E402


def cases(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(FOLDER / "distributed_cases.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("Need at least 2 CUDA devices", "needs a GPU"),
        ("CUDA is not available.", "needs a GPU"),
        ("Only Nccl supports CUDA all_to_all_single", "needs nccl"),
        ("Test requires backend gloo to be one of {'nccl'}", "needs nccl"),
        ("Only MPI supports CPU all_to_all_single", "needs mpi"),
        ("Skipped due to small world size.", "needs another world size"),
        ("https://github.com/pytorch/pytorch/issues/77317", "disabled by the suite"),
    ],
)
def test_the_words_of_the_suite_exempt(text: str, rule: str) -> None:
    found = exemption_by_text(text)
    assert found is not None and (found.rule, found.reason) == (rule, text)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "Skipped because distributed backend is not available.",
        "Test requires backend gloo to be available",
        "Test skipped at subprocess level, look at subprocess log for skip reason",
        "The gloo backend does not support DistributedDataParallel",
    ],
)
def test_other_words_exempt_nothing(text: str) -> None:
    assert exemption_by_text(text) is None


def test_what_is_of_gloo_alone_applies_to_gloo() -> None:
    name = "test_monitored_barrier_gloo"
    assert exemption_by_name(name, "gloo") is None
    assert exemption_by_name(name, "elastic") is not None
    assert exemption_by_name("test_barrier", "elastic") is None


def test_the_error_is_that_of_a_process_of_the_case() -> None:
    outer = "RuntimeError: Process 1 exited with error code 10 and exception:"
    text = f"Traceback (most recent call last):\n{outer}\nTraceback (most recent call last):\na.b.OddError: why\n"
    assert last_error(text) == "a.b.OddError: why"
    assert last_error(f"{outer}\n") == outer
    assert last_error("what\n") == "what"


def test_runs_and_exempts_cases(tmp_path: Path) -> None:
    done = cases("--backend", "gloo", "--world-size", "3", "--only", "test_broadcast*", "--json", str(tmp_path / "out"))
    rows = {row["case"]: row for row in json.loads((tmp_path / "out").read_text())["cases"]}
    assert done.returncode == 0, done.stdout + done.stderr
    assert rows["test_broadcast"]["outcome"] == "passed"
    assert rows["test_broadcast_group"]["rule"] == "needs another world size"
    assert rows["test_broadcast_cuda"]["rule"] == "needs a GPU"
    assert rows["test_broadcast_object_list"]["rule"] == "disabled by the suite"
    assert "gloo: 2 passed, 0 failed, 3 not applicable" in done.stdout


def test_a_case_over_its_limit_fails_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    done = cases("--backend", "gloo", "--only", "test_barrier_timeout_full_group", "--limit", "1")
    assert done.returncode == 1, done.stdout + done.stderr
    assert "timed out" in done.stdout
    assert not list(tmp_path.iterdir())
    # Whatever its processes are: they would have these folders in their environment.
    assert not [process.pid for process in psutil.process_iter() if str(tmp_path) in environment_of(process)]


def environment_of(process: psutil.Process) -> str:
    try:
        return "\n".join(process.environ().values())
    except psutil.Error:
        return ""


def test_refuses_what_names_no_case() -> None:
    done = cases("--backend", "gloo", "--only", "nothing")
    assert done.returncode == 2 and "no case is named like 'nothing'" in done.stderr
