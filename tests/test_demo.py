"""scripts/demo.py: what it compares, what it shows, how it ends. The runs themselves are `make demo`."""

import json
import re
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from elaswave.core.injection import parse_injection
from elaswave_launch.flags import parse
from scripts import demo

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "scripts" / "demo.py"
LIMIT_S = 60.0


@pytest.fixture
def incident() -> demo.Incident:
    return demo.Incident(
        cause="killed", workers=(5,), step=9, phase="backward", times=(0.025, 0.004, -1.0, 0.3, 0.2, -0.05),
        redone_hops=6, dead_hops=7, step_hops=64,
    )  # fmt: skip


@pytest.fixture
def run(incident: demo.Incident) -> demo.Run:
    incidents = tuple(replace(incident, workers=(worker,)) for worker, _ in demo.KILLS)
    return demo.Run(steps=12, digest="ab", losses=("2.5", "2.25"), samples_digest="cd", incidents=incidents)


def test_faults_and_flags_are_those_of_the_launcher() -> None:
    for steps in (demo.LEAST_STEPS, demo.DEFAULT_STEPS):
        flags = demo.injections(steps)
        found = [parse_injection(flag.removeprefix("--inject=")) for flag in flags]
        hit = [injection.step for injection in found]
        assert hit == sorted(set(hit))
        assert max(hit) < steps - 1
        assert len({injection.worker for injection in found}) == len(demo.KILLS)
        assert parse([*demo.ELASTIC, *flags, "script.py"], {}).script == "script.py"
    assert parse([*demo.QUIET, "script.py"], {}).script == "script.py"


@pytest.mark.parametrize("field", ["digest", "samples_digest", "losses", "steps"])
def test_any_difference_is_a_failure(
    run: demo.Run, field: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    others = {"digest": "00", "samples_digest": "00", "losses": ("2.75", "2.25"), "steps": 11}
    for quiet, code in ((run, 0), (replace(run, **{field: others[field]}), 1)):
        runs = iter((run, quiet))
        monkeypatch.setattr(demo, "train", lambda *_, runs=runs: next(runs))
        assert demo.demonstrate(12, tmp_path) == code
        shown = capsys.readouterr().out
        assert ("Equal: " in shown) == (code == 0)
        assert ("DIFFERENT: " in shown) == (code == 1)


def test_two_runs_without_a_digest_are_not_equal(run: demo.Run) -> None:
    without = replace(run, digest="")
    assert demo.comparison(without, without)[1] is False


def test_a_run_in_which_nobody_died_is_a_failure(
    run: demo.Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo, "train", lambda *_: replace(run, incidents=run.incidents[:2]))
    with pytest.raises(demo.DemoError, match="2 workers were killed instead of 3"):
        demo.demonstrate(12, tmp_path)


def test_table_shows_what_is_known(incident: demo.Incident) -> None:
    join = replace(incident, cause="join", workers=(8,), phase="", redone_hops=0, dead_hops=0)
    lines = [line.split() for line in demo.table([incident, join]).splitlines()]
    assert lines[1] == ["10", "worker", "5", "killed", "backward", "25", "4", "-", "300", "200", "-50", "7", "6", "64"]
    assert lines[2] == ["10", "worker", "8", "joins", "-", "25", "4", "-", "300", "200", "-50", "-", "-", "-"]


def test_reads_a_report(run: demo.Run, tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    incidents = [
        {**{name: getattr(found, name) for name in ("cause", "step", "phase", "redone_hops", "dead_hops", "step_hops")},
         "workers": list(found.workers),
         **{f"{name}_s": seconds for name, seconds in zip(demo.TIMES, found.times, strict=True)}}
        for found in run.incidents
    ]  # fmt: skip
    path.write_text(json.dumps({"steps": 12, "digest": "ab", "losses": ["2.5", "2.25"], "samples_digest": "cd",
                                "incidents": incidents}))  # fmt: skip
    assert demo.read_report(path) == run
    path.write_text("{}")
    with pytest.raises(demo.DemoError, match=re.escape(str(path))):
        demo.read_report(path)


def test_too_few_steps_are_refused() -> None:
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--steps", "7"], capture_output=True, text=True, timeout=LIMIT_S, check=False
    )
    assert done.returncode == 2
    assert "--steps 7: must be at least 8" in done.stderr


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_the_launcher_does_not_outlive_the_demo(number: signal.Signals) -> None:
    code = (
        "import signal\n"
        "from scripts import demo\n"
        "signal.signal(signal.SIGTERM, demo._end_by_signal)\n"
        "demo._run(['sh', '-c', 'echo started; exec sleep 1000'])\n"
    )
    # The stand-in for the launcher holds the other end of the pipe: its end is the end of the output.
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=ROOT) as process:
        assert process.stdout is not None
        try:
            assert process.stdout.readline() == "started\n"
            process.send_signal(number)
            assert process.stdout.read() == ""
            assert process.wait(LIMIT_S) in (128 + signal.SIGTERM, -signal.SIGKILL)
        finally:
            process.kill()
