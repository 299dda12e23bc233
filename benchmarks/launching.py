"""Runs of elaswave-launch and of plain scripts as child processes, with a run folder of their own.

Children die with the benchmark, whatever ends it, and all that a `Place` has started has ended when it is left.
"""

import asyncio
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from common import BenchmarkFailed

from elaswave.core.events import Incident
from elaswave.core.status import JobStatus, WorkerStatus
from elaswave.errors import PeerError
from elaswave_launch.rundir import base_folder, running_jobs
from elaswave_launch.wire import Operator

JOBS = Path(__file__).resolve().parent / "jobs"
END_LIMIT_S = 30.0
POLL_S = 0.05
_TAIL_BYTES = 4000

# The same process becomes the launcher: what is measured is not changed by tying it to this one.
_LAUNCH = """\
import sys
from elaswave.lifeline import end_with_parent
end_with_parent(int(sys.argv.pop(1)))
from elaswave_launch.cli import main
sys.exit(main())
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What benchmarks need of a job's report. step_seconds[0] is not a step's time (docs/report.md)."""

    step_seconds: tuple[float, ...]
    digest: str

    def mean_step_s(self, warm_up: int) -> float:
        """Seconds per step after the first `warm_up` ones. Raises BenchmarkFailed where no step is left."""
        measured = self.step_seconds[max(1, warm_up) :]
        if not measured:
            raise BenchmarkFailed(f"{len(self.step_seconds)} steps, {warm_up} of them to warm up: none to measure")
        return sum(measured) / len(measured)


class Child:
    """A process of ours in a process group of its own, its output in a file."""

    def __init__(self, name: str, command: Sequence[str], environment: Mapping[str, str], output: Path) -> None:
        """Start it from the main thread: it may ask to be killed when this thread ends. `name` is for messages."""
        self._name = name
        self._output = output
        self.started_at = time.monotonic()
        with output.open("ab") as file:
            self.process = subprocess.Popen(
                command, env=dict(environment), stdin=subprocess.DEVNULL, stdout=file, stderr=file, process_group=0
            )

    @property
    def running(self) -> bool:
        return self.process.poll() is None

    def wait(self, limit_s: float) -> int:
        """Its exit code. Raises BenchmarkFailed when it has not ended within the limit."""
        try:
            return self.process.wait(limit_s)
        except subprocess.TimeoutExpired as error:
            raise BenchmarkFailed(f"{self._name} has not ended after {limit_s:g} s\n{self.tail()}") from error

    def succeed(self, limit_s: float) -> None:
        """Wait for its good end. Raises BenchmarkFailed for any other."""
        code = self.wait(limit_s)
        if code:
            raise BenchmarkFailed(f"{self._name} ended with exit code {code}\n{self.tail()}")

    def tail(self) -> str:
        """The end of its output."""
        return self._output.read_bytes()[-_TAIL_BYTES:].decode("utf-8", "replace")

    def end(self) -> None:
        """Make sure that it and its process group are gone."""
        for number in (signal.SIGTERM, signal.SIGKILL):
            if self.running:
                os.killpg(self.process.pid, number)
                try:
                    self.process.wait(END_LIMIT_S)
                except subprocess.TimeoutExpired:
                    continue
        self.process.wait()


class Job:
    """A job under elaswave-launch, with the view and the hands of an operator."""

    def __init__(self, child: Child, environment: Mapping[str, str], report: Path) -> None:
        self.child = child
        self._environment = environment
        self._report = report
        self._runner = asyncio.Runner()
        self._operator: Operator | None = None

    def report(self, limit_s: float) -> Report:
        """Wait for the good end of the job and read its report. Raises BenchmarkFailed."""
        self.child.succeed(limit_s)
        content = json.loads(self._report.read_text())
        return Report(step_seconds=tuple(content["step_seconds"]), digest=content["digest"])

    def status(self) -> JobStatus | None:
        """The job now; None before its controller can be asked. Raises BenchmarkFailed where it has ended."""
        if not self.child.running:
            raise BenchmarkFailed(f"the job ended with exit code {self.child.process.returncode}\n{self.child.tail()}")
        if self._operator is None:
            found = running_jobs(base_folder(self._environment))
            if not found:
                return None
            self._operator = self._runner.run(_connect(found[0].address, found[0].token))
        try:
            return self._runner.run(self._operator.status())
        except PeerError:
            return None  # not up yet, or about to end: then the next call says so

    def wait_until(self, wanted: Callable[[JobStatus], bool], limit_s: float, what: str) -> JobStatus:
        """Ask every `POLL_S` until the status is as wanted. Raises BenchmarkFailed when it never is."""
        deadline = time.monotonic() + limit_s
        status: JobStatus | None = None
        while time.monotonic() < deadline:
            status = self.status()
            if status is not None and wanted(status):
                return status
            time.sleep(POLL_S)
        seen = "no status" if status is None else f"state {status.state}, step {status.step}, epoch {status.epoch}"
        raise BenchmarkFailed(f"{what}: not within {limit_s:g} s ({seen})\n{self.child.tail()}")

    def wait_steady(self, workers: int, steps: int, limit_s: float) -> JobStatus:
        """Wait until `workers` members have trained `steps` steps under one plan, without an open incident."""
        epoch, since = -1, 0

        def is_steady(status: JobStatus) -> bool:
            nonlocal epoch, since
            whole = status.state == "training" and len(members(status)) == workers
            if not whole or status.epoch != epoch:
                epoch, since = status.epoch, status.step
                return False
            return status.step >= since + steps

        return self.wait_until(is_steady, limit_s, f"{workers} workers in steady training")

    def wait_incident(self, worker: int, limit_s: float) -> Incident:
        """Wait for the closed incident that names this worker."""
        status = self.wait_until(
            lambda status: incident_of(status, worker) is not None, limit_s, f"the incident of worker {worker}"
        )
        found = incident_of(status, worker)
        if found is None:
            raise BenchmarkFailed(f"the incident of worker {worker} is gone")
        return found

    def stop(self) -> None:
        """Ask the job to end and wait for it."""
        if self._operator is not None and self.child.running:
            self._runner.run(self._operator.stop("the benchmark has its figures"))
            self.child.wait(END_LIMIT_S)

    def close(self) -> None:
        """End it, if it still runs."""
        if self._operator is not None:
            self._runner.run(self._operator.close())
            self._operator = None
        self._runner.close()
        self.child.end()


async def _connect(address: str, token: str) -> Operator:
    return Operator(address, token)  # inside the loop that will use its channel


def members(status: JobStatus) -> list[WorkerStatus]:
    """Workers in the plan that have a process."""
    return [worker for worker in status.workers if worker.state == "member" and worker.pid and worker.layers]


def incident_of(status: JobStatus, worker: int) -> Incident | None:
    """The last closed incident in which this worker was lost."""
    found = [incident for incident in status.incidents if worker in incident.workers and incident.cause != "join"]
    return found[-1] if found else None


class Place:
    """A working folder and a run folder of its own. Use `make_place`."""

    def __init__(self, work: Path, runtime: Path) -> None:
        self.work = work
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("PET_", "ELASWAVE_"))}
        # gloo and torch's elastic agent would look for the address of the host's name.
        self.environment: dict[str, str] = {
            **kept,
            "XDG_RUNTIME_DIR": str(runtime),
            "OMP_NUM_THREADS": "1",
            "GLOO_SOCKET_IFNAME": "lo",
            "TP_SOCKET_IFNAME": "lo",
            "PYTHONUNBUFFERED": "1",
            "PYTHONWARNINGS": "ignore",
        }
        self._jobs: list[Job] = []
        self._children: list[Child] = []
        self._started = 0

    def folder(self, name: str) -> Path:
        """A new folder in the working folder."""
        self._started += 1
        path = self.work / f"{self._started:03}-{name}"
        path.mkdir()
        return path

    def launch(self, flags: Sequence[str], script: str, script_flags: Sequence[str] = ()) -> Job:
        """Start a job of benchmarks/jobs on this machine."""
        folder = self.folder("job")
        report = folder / "report.json"
        command = [
            *(sys.executable, "-c", _LAUNCH, str(os.getpid()), "--standalone", *flags),
            *(f"--report={report}", f"--log-dir={folder / 'logs'}", str(JOBS / script), *script_flags),
        ]
        name = f"elaswave-launch {' '.join(flags)} {script} {' '.join(script_flags)}"
        job = Job(Child(name, command, self.environment, folder / "output.txt"), self.environment, report)
        self._jobs.append(job)
        return job

    def train(self, flags: Sequence[str], script: str, script_flags: Sequence[str], limit_s: float) -> Report:
        """Run a job to its end."""
        job = self.launch(flags, script, script_flags)
        try:
            return job.report(limit_s)
        finally:
            self.close_job(job)

    def close_job(self, job: Job) -> None:
        """End a job before the place is left."""
        job.close()
        self._jobs.remove(job)

    def start(self, command: Sequence[str], output: Path, extra: Mapping[str, str] | None = None) -> Child:
        """Start any other process."""
        child = Child(Path(command[1]).name, command, {**self.environment, **(extra or {})}, output)
        self._children.append(child)
        return child

    def close(self) -> None:
        """End everything that was started here."""
        for job in self._jobs:
            job.close()
        for child in self._children:
            child.end()


@contextmanager
def make_place() -> Iterator[Place]:
    """Folders that are removed at the end, when all that was started in them has ended."""
    work = Path(tempfile.mkdtemp(prefix="elaswave-benchmark-"))
    runtime = Path(tempfile.mkdtemp(prefix="ew"))  # short: paths of sockets are limited
    place = Place(work, runtime)
    try:
        yield place
    finally:
        place.close()
        shutil.rmtree(work)
        shutil.rmtree(runtime, ignore_errors=True)
