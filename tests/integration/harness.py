"""Runs of elaswave-launch as real processes, what they report, and proof that nothing of them stays."""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import psutil
from resident import Resident
from tiny_job import TinyOptions, make_job

from elaswave.core.shape import CHUNK_ELEMENTS
from elaswave.runtime.reference import train_reference

LIMIT_S = 100.0
"""For a whole run; ordinary ones take a few seconds."""

_LEAVE_LIMIT_S = 5.0
_LOG_TAIL_BYTES = 3000
SCRIPT = Path(__file__).with_name("tiny_job.py")
_SHARED_MEMORY = Path("/dev/shm")


@dataclass(frozen=True, slots=True, kw_only=True)
class IncidentSeen:
    """An incident as the report has it; see docs/report.md."""

    cause: str
    evidence: str
    workers: frozenset[int]
    step: int
    phase: str
    redone_hops: int
    dead_hops: int
    step_hops: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ReportSeen:
    """The parts of a report that tests compare."""

    exit_code: int
    message: str
    first_step: int
    steps: int
    digest: str
    losses: tuple[str | None, ...]
    samples_digest: str
    skipped_steps: tuple[int, ...]
    incidents: tuple[IncidentSeen, ...]
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Oracle:
    """What an undisturbed run gives."""

    digest: str
    losses: tuple[str, ...]
    samples_digest: str
    samples: tuple[int, ...]
    skipped_steps: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Ended:
    """A run that is over. `report` is None where none was written."""

    exit_code: int
    out: str
    err: str
    seconds: float
    report: ReportSeen | None
    logs: str

    def need_report(self) -> ReportSeen:
        """The report; fails with everything that is known where there is none."""
        assert self.report is not None, f"no report; exit code {self.exit_code}\n{self.story()}"
        return self.report

    def story(self) -> str:
        """Output and logs, for a failing test."""
        return f"--- stdout\n{self.out}\n--- stderr\n{self.err}\n--- logs\n{self.logs}"


@dataclass(slots=True)
class _Lines:
    """Lines of a stream, as a thread reads them."""

    lines: list[str] = field(default_factory=list)
    ended: bool = False
    changed: threading.Condition = field(default_factory=threading.Condition)


class Job:
    """A running launcher. Use `Ground.start`; ended by `Ground`'s end at the latest."""

    def __init__(
        self,
        arguments: Sequence[str],
        work: Path,
        environment: dict[str, str],
        report: Path,
        limit_s: float,
    ) -> None:
        self._limit_s = limit_s
        self._work = work
        self._report = report
        self._started_at = time.monotonic()
        self.process = subprocess.Popen(
            arguments,
            cwd=work,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self._streams = (_Lines(), _Lines())
        pipes = (self.process.stdout, self.process.stderr)
        self._readers = [
            threading.Thread(target=_read, args=(pipe, lines), daemon=True)
            for pipe, lines in zip(pipes, self._streams, strict=True)
        ]
        for reader in self._readers:
            reader.start()

    def wait_line(self, pattern: str, count: int = 1) -> str:
        """The `count`-th line of stderr that matches; fails when the job ends, or the limit passes, before it."""
        stream = self._streams[1]
        deadline = self._started_at + self._limit_s
        with stream.changed:
            while True:
                found = [line for line in stream.lines if re.search(pattern, line)]
                if len(found) >= count:
                    return found[count - 1]
                waiting = not stream.ended and stream.changed.wait(deadline - time.monotonic())
                assert waiting, f"no line {pattern!r} came\n" + self._story()

    def wait(self) -> Ended:
        """Until the launcher has ended. Fails when late, with the stacks of its processes where py-spy is installed."""
        try:
            code = self.process.wait(max(0.0, self._started_at + self._limit_s - time.monotonic()))
        except subprocess.TimeoutExpired:
            stacks = self._stacks()
            self.process.kill()
            self.process.wait()
            raise AssertionError(
                f"not ended after {self._limit_s:g} s\n{self._story()}\n--- stacks\n{stacks}"
            ) from None
        seconds = time.monotonic() - self._started_at
        for reader in self._readers:
            reader.join(LIMIT_S)
        out, err = ("".join(stream.lines) for stream in self._streams)
        report = read_report(self._report) if self._report.exists() else None
        return Ended(exit_code=code, out=out, err=err, seconds=seconds, report=report, logs=_logs(self._work))

    def family(self) -> list[psutil.Process]:
        """The launcher and all its descendants."""
        launcher = psutil.Process(self.process.pid)
        return [launcher, *launcher.children(recursive=True)]

    def one(self, module: str, *texts: str) -> psutil.Process:
        """The process of the job that runs `module` and has all the texts among its arguments."""
        for process in self.family():
            command = process.cmdline()
            if module in command and set(texts) <= set(command):
                return process
        raise AssertionError(f"the job has no process {module} {texts}\n{self._story()}")

    def abandon(self) -> None:
        """Kill the launcher, if it still runs, and let go of its pipes."""
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        for reader in self._readers:
            reader.join(LIMIT_S)
        for pipe in (self.process.stdout, self.process.stderr):
            if pipe is not None:
                pipe.close()

    def _story(self) -> str:
        out, err = ("".join(stream.lines) for stream in self._streams)
        return f"--- stdout\n{out}\n--- stderr\n{err}\n--- logs\n{_logs(self._work)}"

    def _stacks(self) -> str:
        spy = Path(sys.executable).with_name("py-spy")
        if not spy.exists():
            return "py-spy is not installed"
        commands = [[str(spy), "dump", "--pid", str(process.pid)] for process in self.family()]
        dumps = [subprocess.run(command, capture_output=True, text=True, check=False) for command in commands]
        return "\n".join(dump.stdout + dump.stderr for dump in dumps)


class Ground:
    """Where the runs of one test happen: a working folder, and a run folder that only they use."""

    def __init__(self, work: Path, runtime: Path, resident: Resident | None) -> None:
        self.work = work
        self._runtime = runtime
        self._resident = resident
        self._jobs: list[Job] = []
        self._shared_memory = _shared_memory()

    @property
    def environment(self) -> dict[str, str]:
        """The environment of every process of these runs: XDG_RUNTIME_DIR tells them from all others.

        Of what a job outside has set only the files of TLS are kept, which tests set themselves.
        """
        kept = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("PET_", "ELASWAVE_")) or name.startswith("ELASWAVE_TLS_")
        }
        return {**kept, "XDG_RUNTIME_DIR": str(self._runtime)}

    def start(
        self,
        flags: Sequence[str],
        script_flags: Sequence[str] = (),
        *,
        script: Path = SCRIPT,
        limit_s: float = LIMIT_S,
        inside: Sequence[str] = (),
    ) -> Job:
        """Start a launcher; each run has its own log folder and report. inside: the command is put before it."""
        folder = self.work / f"run{len(self._jobs)}"
        folder.mkdir()
        report = folder / "report.json"
        zygote = [] if self._resident is None else [f"--zygote={self._resident.socket}"]
        shards = f"--shard-elements={CHUNK_ELEMENTS}"  # small, so that every worker owns something
        arguments = [
            *inside,
            *(sys.executable, "-m", "elaswave_launch.cli"),
            *flags,
            shards,
            *zygote,
            f"--report={report}",
            f"--log-dir={folder / 'logs'}",
            str(script),
            *script_flags,
        ]
        job = Job(arguments, folder, self.environment, report, limit_s)
        self._jobs.append(job)
        return job

    def run(self, flags: Sequence[str], script_flags: Sequence[str] = ()) -> Ended:
        """A run to its end, with proof that nothing of it stays."""
        ended = self.start(flags, script_flags).wait()
        self.check_nothing_left()
        return ended

    def operate(self, *arguments: str, inside: Sequence[str] = ()) -> subprocess.CompletedProcess[str]:
        """Run the `elaswave` command on the job of this place. inside: is put before it."""
        command = (*inside, sys.executable, "-m", "elaswave_launch.operator", *arguments)
        return subprocess.run(
            command, env=self.environment, capture_output=True, text=True, timeout=LIMIT_S, check=False
        )

    def check_nothing_left(self, *, killed: bool = False) -> None:
        """No process, no shared memory and, unless the launcher was killed, no run folder. Waits a little for ends."""
        mine = self.processes()
        _, alive = psutil.wait_procs(mine, timeout=_LEAVE_LIMIT_S)
        described = [_describe(process) for process in alive]
        for process in alive:
            process.kill()
        assert not described, f"processes stay: {described}"
        assert _shared_memory() <= self._shared_memory, "shared memory stays"
        base = self._runtime / f"elaswave-{os.getuid()}"
        folders = sorted(base.iterdir()) if base.exists() else []
        assert killed or not folders, f"run folders stay: {folders}"

    def close(self) -> None:
        """End what a failed test left."""
        for job in self._jobs:
            job.abandon()
        for process in self.processes():
            process.kill()

    def processes(self) -> list[psutil.Process]:
        """Everything that was started for a run here, whoever its parent is now."""
        found = [] if self._resident is None else self._resident.workers()
        for process in psutil.process_iter():
            try:
                ours = process.environ().get("XDG_RUNTIME_DIR") == str(self._runtime)
                if ours and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
            except psutil.Error:
                continue  # ended meanwhile, or not ours to look into
        return found


@contextmanager
def make_ground(work: Path, resident: Resident | None = None) -> Iterator[Ground]:
    """A place for runs, forked from `resident` or each from a zygote of its own.

    Its run folder has a short path, as those of sockets are limited.
    """
    runtime = Path(tempfile.mkdtemp(prefix="ew", dir="/tmp"))
    ground = Ground(work, runtime, resident)
    try:
        yield ground
    finally:
        ground.close()
        shutil.rmtree(runtime)


@cache
def oracle(options: TinyOptions) -> Oracle:
    """The undisturbed run of a job, in this process."""
    done = train_reference(make_job(options))
    samples = b"".join(value.to_bytes(8, "little") for value in done.samples)
    return Oracle(
        digest=done.digest,
        losses=tuple(repr(loss) for loss in done.losses),
        samples_digest=hashlib.sha256(samples).hexdigest(),
        samples=done.samples,
        skipped_steps=tuple(result.step for result in done.steps if result.skipped),
    )


def assert_same_training(ended: Ended, options: TinyOptions) -> None:
    """The run went through every step with the bits of the undisturbed one."""
    assert ended.exit_code == 0, ended.story()
    report, wanted = ended.need_report(), oracle(options)
    assert (report.exit_code, report.message) == (0, ""), ended.story()
    assert (report.first_step, report.steps, len(report.losses)) == (0, options.steps, options.steps), report.text
    assert report.losses == wanted.losses, report.text
    assert report.samples_digest == wanted.samples_digest, report.text
    assert report.digest == wanted.digest, report.text


def read_report(path: Path) -> ReportSeen:
    """Read a report. Raises KeyError where a field is missing."""
    text = path.read_text()
    content = json.loads(text)
    return ReportSeen(
        exit_code=content["exit_code"],
        message=content["message"],
        first_step=content["first_step"],
        steps=content["steps"],
        digest=content["digest"],
        losses=tuple(content["losses"]),
        samples_digest=content["samples_digest"],
        skipped_steps=tuple(content["skipped_steps"]),
        incidents=tuple(
            IncidentSeen(
                cause=found["cause"],
                evidence=found["evidence"],
                workers=frozenset(found["workers"]),
                step=found["step"],
                phase=found["phase"],
                redone_hops=found["redone_hops"],
                dead_hops=found["dead_hops"],
                step_hops=found["step_hops"],
            )
            for found in content["incidents"]
        ),
        text=text,
    )


def _read(pipe: Iterator[str], lines: _Lines) -> None:
    for line in pipe:
        with lines.changed:
            lines.lines.append(line)
            lines.changed.notify_all()
    with lines.changed:
        lines.ended = True
        lines.changed.notify_all()


def _logs(work: Path) -> str:
    parts = []
    for path in sorted((work / "logs").rglob("*")):
        if path.is_file() and path.stat().st_size:
            parts.append(f"{path.name}: {path.read_bytes()[-_LOG_TAIL_BYTES:].decode('utf-8', 'replace')}")
    return "\n".join(parts)


def _shared_memory() -> set[str]:
    return {entry.name for entry in _SHARED_MEMORY.iterdir()} if _SHARED_MEMORY.is_dir() else set()


def _describe(process: psutil.Process) -> str:
    try:
        return f"{process.pid} {process.status()} {' '.join(process.cmdline())}"
    except psutil.Error:
        return str(process.pid)
