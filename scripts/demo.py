"""What `make demo` runs: trains a GPT with 8 workers, kills three of them, and compares the bits with a quiet run.

Uses what every user has: the command elaswave-launch and its report (docs/report.md). Exit code 0 when the parameters,
losses and samples of both runs are equal, 1 when they differ or a run fails, 130 after Ctrl-C.
"""

import argparse
import json
import os
import shlex
import signal
import subprocess
import sys
import textwrap
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from types import FrameType
from typing import NoReturn

from elaswave.lifeline import end_with_parent

ROOT = Path(__file__).resolve().parent.parent
EXAMPLE = Path("examples", "pretrain_gpt.py")

DEFAULT_STEPS = 36
LEAST_STEPS = 8
"""With fewer, the kills would fall into neighbouring steps."""

RUN_LIMIT_S = 1200.0
"""A run takes half a minute on two idle cores; this is for machines that do much else."""

WIDTH = 100
"""Columns of a shown command line."""

END_LIMIT_S = 8.0
"""The launcher ends everything within 5 s of a signal."""

TRAINING = ("--seq", "64")
ELASTIC = (
    "--standalone", "--nnodes", "4", "--nproc-per-node", "2", "--dp", "4", "--pp", "2", "--max-restarts", "3",
)  # fmt: skip
QUIET = ("--standalone", "--nproc-per-node", "1", "--dp", "1", "--pp", "1")
KILLS = ((5, "backward"), (2, "reduce"), (0, "forward"))
"""Worker and phase, one after the other over the steps. Odd workers have the second half of the layers."""


class DemoError(Exception):
    """A run failed, or its report is not what it has to be."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Incident:
    """One failure or planned change. Times in seconds, -1 where not known."""

    cause: str
    workers: tuple[int, ...]
    step: int
    phase: str
    times: tuple[float, ...]
    """In the order of TIMES."""

    redone_hops: int
    dead_hops: int
    step_hops: int


TIMES = ("detect", "plan", "edit", "repair", "resume", "delay")
"""Fields of an incident in the report, less their "_s". resume: from the last sign of life to the first lost pass begun
elsewhere."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """What the demo reads of a report."""

    steps: int
    digest: str
    losses: tuple[str, ...]
    samples_digest: str
    incidents: tuple[Incident, ...]


def main() -> int:
    """Run the demo; its exit code."""
    parser = argparse.ArgumentParser(prog="demo.py", description="Train, kill workers on the way, compare the bits.")
    parser.add_argument("--steps", type=int, default=DEFAULT_STEPS, help=f"training steps (default: {DEFAULT_STEPS})")
    parser.add_argument("--report-dir", metavar="DIR", help="keep the reports of both runs in this folder")
    options = parser.parse_args()
    if options.steps < LEAST_STEPS:
        parser.error(f"--steps {options.steps}: must be at least {LEAST_STEPS}")
    signal.signal(signal.SIGTERM, _end_by_signal)
    try:
        if options.report_dir is not None:
            folder = Path(options.report_dir)
            folder.mkdir(parents=True, exist_ok=True)
            return demonstrate(options.steps, folder)
        with TemporaryDirectory(prefix="elaswave-demo-") as name:
            return demonstrate(options.steps, Path(name))
    except (DemoError, OSError) as error:
        sys.stderr.write(f"demo: {error}\n")
        return 1
    except KeyboardInterrupt:
        return 128 + signal.SIGINT


def demonstrate(steps: int, folder: Path) -> int:
    """Both runs, with their reports in `folder`, and the comparison. Raises DemoError, OSError."""
    _say(f"1. {steps} steps with 8 workers on 4 emulated nodes: DP 4 x PP 2. {len(KILLS)} workers get SIGKILL.\n")
    disturbed = train((*ELASTIC, *injections(steps)), steps, folder / "killed.json")
    _say(f"\nIncidents (steps from 1, as above; --inject counts from 0)\n\n{table(disturbed.incidents)}")
    killed = sum(len(incident.workers) for incident in disturbed.incidents if incident.cause == "killed")
    if killed != len(KILLS):
        raise DemoError(f"{killed} workers were killed instead of {len(KILLS)}: the comparison would show nothing")
    _say("2. The same training again, undisturbed and with one worker.\n")
    quiet = train(QUIET, steps, folder / "undisturbed.json")
    text, equal = comparison(disturbed, quiet)
    _say(f"\nComparison\n\n{text}")
    return 0 if equal else 1


def injections(steps: int) -> list[str]:
    """Flags that kill a worker after each quarter of the steps."""
    quarter = steps // (len(KILLS) + 1)
    return [
        f"--inject=kill:worker={worker},step={quarter * (index + 1)},phase={phase}"
        for index, (worker, phase) in enumerate(KILLS)
    ]


# ---------------------------------------------------------------------- a run


def train(flags: Sequence[str], steps: int, report: Path) -> Run:
    """Run elaswave-launch with these flags; what it reports. Raises DemoError where it fails."""
    launcher = Path(sys.executable).with_name("elaswave-launch")
    shown = ["elaswave-launch", *flags, "--report", report.name, str(EXAMPLE), "--steps", str(steps), *TRAINING]
    lines = textwrap.wrap(shlex.join(shown), WIDTH, break_long_words=False, break_on_hyphens=False)
    _say("   $ " + " \\\n       ".join(lines) + "\n")
    command = [str(launcher), *flags, "--report", str(report.resolve()), str(EXAMPLE), "--steps", str(steps), *TRAINING]
    exit_code = _run(command)
    if exit_code != 0:
        raise DemoError(f"elaswave-launch ended with exit code {exit_code}: see above")
    return read_report(report)


def _run(command: Sequence[str]) -> int:
    # Between fork and exec in a process with one thread: the kernel ends the launcher with us, whatever ends us.
    process = subprocess.Popen(command, cwd=ROOT, preexec_fn=partial(end_with_parent, os.getpid()))  # noqa: PLW1509
    told = False
    try:
        return process.wait(RUN_LIMIT_S)
    except subprocess.TimeoutExpired as error:
        raise DemoError(f"the run has not ended within {RUN_LIMIT_S:g} s") from error
    except KeyboardInterrupt:
        told = True  # Ctrl-C reaches the launcher too, and a second signal would cut its orderly end short
        raise
    finally:
        _end(process, told)


def _end(process: subprocess.Popen[bytes], told: bool) -> None:
    """See to it that the launcher has ended; `told`: it has been asked to already."""
    for number in (None if told else signal.SIGTERM, signal.SIGTERM, signal.SIGKILL):
        if process.poll() is not None:
            return
        if number is not None:
            process.send_signal(number)
        with suppress(subprocess.TimeoutExpired):
            process.wait(END_LIMIT_S)


def read_report(path: Path) -> Run:
    """The report of a run. Raises DemoError where it is not one."""
    try:
        content = json.loads(path.read_text())
        return Run(
            steps=content["steps"],
            digest=content["digest"],
            losses=tuple(content["losses"]),
            samples_digest=content["samples_digest"],
            incidents=tuple(
                Incident(
                    cause=found["cause"],
                    workers=tuple(found["workers"]),
                    step=found["step"],
                    phase=found["phase"],
                    times=tuple(found[f"{name}_s"] for name in TIMES),
                    redone_hops=found["redone_hops"],
                    dead_hops=found["dead_hops"],
                    step_hops=found["step_hops"],
                )
                for found in content["incidents"]
            ),
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DemoError(f"report {path} cannot be read: {error!r}") from error


# ---------------------------------------------------------------------- what is shown


def table(incidents: Sequence[Incident]) -> str:
    """One line for each incident, with the time of its phases and the work that was done again."""
    rows = [("step", "what", "in phase", *(f"{name} ms" for name in TIMES), "lost hops", "redone", "hops of step")]
    for incident in incidents:
        names = ", ".join(map(str, incident.workers))
        hops = (incident.dead_hops, incident.redone_hops, incident.step_hops)
        failed = incident.cause != "join"
        what = f"worker {names} {incident.cause if failed else 'joins'}"
        times = (_milliseconds(*pair) for pair in zip(TIMES, incident.times, strict=True))
        counts = (str(count) if failed else "-" for count in hops)
        rows.append((str(incident.step + 1), what, incident.phase or "-", *times, *counts))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("   " + "  ".join(map(_align, row, widths, range(len(row)))).rstrip() for row in rows)
    return "\n".join(lines) + "\n"


def _milliseconds(name: str, seconds: float) -> str:
    unknown = seconds < 0 and name != "delay"  # a step may be faster than the median in spite of a failure
    return "-" if unknown else f"{seconds * 1000:.0f}"


def _align(cell: str, width: int, column: int) -> str:
    return cell.ljust(width) if column in (1, 2) else cell.rjust(width)


def comparison(disturbed: Run, quiet: Run) -> tuple[str, bool]:
    """The result in words, and whether everything is equal that has to be."""
    pairs = (
        ("parameters, sha256", disturbed.digest, quiet.digest),
        ("samples, sha256", disturbed.samples_digest, quiet.samples_digest),
        ("steps", str(disturbed.steps), str(quiet.steps)),
        ("last loss", (disturbed.losses or ("-",))[-1], (quiet.losses or ("-",))[-1]),
    )
    lines = []
    for name, one, other in pairs:
        lines += [f"   {name:<18}  {one}  with failures", f"   {'':<18}  {other}  undisturbed"]
    unequal = [name for name, one, other in pairs if one != other]
    if disturbed.losses != quiet.losses:
        unequal.append("losses")
    if not disturbed.digest:
        unequal.append("parameters (there is no digest)")
    verdict = (
        f"DIFFERENT: {', '.join(dict.fromkeys(unequal))}."
        if unequal
        else f"Equal: every parameter and the losses of all {quiet.steps} steps, bit for bit."
    )
    return "\n".join(lines) + f"\n\n   {verdict}\n", not unequal


def _say(text: str) -> None:
    # The launcher writes to the same terminal or pipe: what is said before it starts must be there before.
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def _end_by_signal(number: int, frame: FrameType | None) -> NoReturn:
    del frame
    raise SystemExit(128 + number)


if __name__ == "__main__":
    sys.exit(main())
