"""Faults from outside on jobs of the emulated device, each on a job in full strength and steady training."""

import os
import random
import select
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from common import BenchmarkFailed, say
from instructions import Execution, Records, Samples
from launching import Job, Place, members

from elaswave.core.events import Incident
from elaswave.core.status import JobStatus

STEPS = 20_000
"""More than any benchmark waits for; jobs are stopped."""

START_LIMIT_S = 120.0
BACK_LIMIT_S = 60.0
"""For a job to be in full strength again after a fault; ordinary ones take two seconds."""

SETTLE_STEPS = 12
"""Steps under one plan before a fault: they are what it is compared with."""

END_LIMIT_S = 30.0
"""For the kernel to end a killed process."""

HANDS_OFF_S = 0.5
"""After a fault nobody asks the controller anything, so as not to disturb what is measured."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Emulation:
    """Layout, device times and memory of a job.

    hop_ms: one direction of one micro-batch through one stage. ballast_gib: what each worker holds besides.
    """

    dp: int
    pp: int
    nnodes: int = 1
    layers: int = 4
    micro_batches: int = 16
    hop_ms: float = 10.0
    restarts: int = 0
    ballast_gib: float = 0.0

    @property
    def workers(self) -> int:
        return self.dp * self.pp

    @property
    def flags(self) -> tuple[str, ...]:
        """Of elaswave-launch."""
        return (
            *(f"--nnodes={self.nnodes}", f"--nproc-per-node={self.workers // self.nnodes}"),
            *(f"--dp={self.dp}", f"--pp={self.pp}", f"--max-restarts={self.restarts}"),
        )

    def script_flags(self, records: Path, steps: int = STEPS) -> tuple[str, ...]:
        """Of jobs/emulated.py."""
        layer_ms = self.hop_ms * self.pp / self.layers
        return (
            *(f"--layers={self.layers}", f"--micro-batches={self.micro_batches}", f"--steps={steps}"),
            *(f"--forward-ms={layer_ms}", f"--backward-ms={layer_ms}", f"--records={records}"),
            f"--ballast-gib={self.ballast_gib}",
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """One signal. at: CLOCK_MONOTONIC seconds. status: just before it. incident: what the job made of it.

    ended_s: seconds until the process had ended; None where it did not soon.
    """

    worker: int
    at: float
    status: JobStatus
    incident: Incident
    ended_s: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Story:
    """Faults of one job, and where its records are."""

    faults: tuple[Fault, ...]
    records: Path


@dataclass(slots=True, kw_only=True)
class Campaign:
    """Sends one signal after another to random workers at random moments, in as many jobs as that takes."""

    place: Place
    emulation: Emulation
    number: signal.Signals
    count: int
    generator: random.Random
    failures: list[str]

    def run(self) -> list[Story]:
        """All stories. A job that does not come back to full strength is a failure and is replaced by a new one.

        Raises BenchmarkFailed when a job cannot be started, or fails before it has stood one fault.
        """
        stories: list[Story] = []
        done = 0
        while done < self.count:
            records = self.place.folder("records")
            job = self.place.launch(self.emulation.flags, "emulated.py", self.emulation.script_flags(records))
            faults: list[Fault] = []
            try:
                for fault in self._faults(job, self.count - done):
                    faults.append(fault)
                    say(f"fault {done + len(faults)} of {self.count}: worker {fault.worker}, {fault.incident.phase}")
            except BenchmarkFailed as error:
                if not faults:
                    raise
                self.failures.append(str(error))
                say(f"a new job is needed: {error}")
            self.place.close_job(job)
            stories.append(Story(faults=tuple(faults), records=records))
            done += len(faults)
        return stories

    def _faults(self, job: Job, count: int) -> Iterator[Fault]:
        limit = START_LIMIT_S
        for _ in range(count):
            status = job.wait_steady(self.emulation.workers, SETTLE_STEPS, limit)
            limit = BACK_LIMIT_S
            yield self._strike(job, status)
        job.wait_steady(self.emulation.workers, 1, BACK_LIMIT_S)
        job.stop()

    def _strike(self, job: Job, status: JobStatus) -> Fault:
        victim = self.generator.choice(members(status))
        # Any moment of a step: it lasts as long as a pipeline's hops, one after the other.
        emulation = self.emulation
        step_s = 2e-3 * emulation.hop_ms * (emulation.micro_batches / emulation.dp + emulation.pp)
        time.sleep(self.generator.uniform(0.0, 2 * step_s))
        pidfd = os.pidfd_open(victim.pid)
        try:
            at = time.monotonic()
            signal.pidfd_send_signal(pidfd, self.number)
            ended = select.select([pidfd], [], [], END_LIMIT_S if self.number == signal.SIGKILL else HANDS_OFF_S)[0]
            ended_s = time.monotonic() - at
        finally:
            os.close(pidfd)
        time.sleep(max(0.0, HANDS_OFF_S - ended_s))
        incident = job.wait_incident(victim.worker, BACK_LIMIT_S)
        if self.number == signal.SIGSTOP:
            os.kill(victim.pid, signal.SIGKILL)  # its fencing some seconds later is not what is measured
        return Fault(worker=victim.worker, at=at, status=status, incident=incident, ended_s=ended_s if ended else None)


def executions_around(story: Story, fault: Fault, emulation: Emulation, records: Records) -> list[Execution]:
    """What was done from the steady steps before a fault to two steps after the one it fell into."""
    samples = Samples(steps=STEPS, micro_batches=emulation.micro_batches)
    steps = range(fault.status.step - SETTLE_STEPS + 1, fault.incident.step + 3)
    return records.executions(samples.places(steps))
