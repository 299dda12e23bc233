"""The systems that benchmarks/rivals.py compares: how each is started, killed and watched, and what a kill cost."""

import json
import os
import random
import signal
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Protocol

from common import BenchmarkFailed
from faults import BACK_LIMIT_S, SETTLE_STEPS, START_LIMIT_S
from launching import JOBS, Child, Place, members

WORLD = 4
STEP_S = 0.05
SETTLED_STEPS = 30
LOOK_EVERY_S = 0.1
RESTART_LIMIT_S = 180.0

# The same process becomes torchrun: its workers and it are tied to this one.
_TORCHRUN = """\
import sys
from elaswave.lifeline import end_with_parent
end_with_parent(int(sys.argv.pop(1)))
from torch.distributed.run import main
main(sys.argv[1:])
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """A line of a process's log. participants and committed: of TorchFT's steps; 0 and True elsewhere."""

    kind: str
    at: float
    pid: int
    step: int
    committed: bool
    participants: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Disturbance:
    """What one kill cost (see rivals.py). Seconds, and steps whose work was lost or done again."""

    normal_s: float
    stall_s: float
    behind_s: float
    lost_steps: float


class System(Protocol):
    """A system that trains, in steady state at first."""

    def disturb(self, generator: random.Random) -> Disturbance:
        """Kill a random worker at a random moment, and wait for steady training of all."""


def read_events(path: Path) -> list[Event]:
    """All whole lines of a log, oldest first; none where it does not exist yet."""
    text = path.read_text() if path.exists() else ""
    lines = [json.loads(line) for line in text.split("\n")[:-1]]
    return [
        Event(
            kind=line["kind"],
            at=line["at"],
            pid=line["pid"],
            step=line.get("step", -1),
            committed=bool(line.get("committed", 1)),
            participants=line.get("participants", 0),
        )
        for line in lines
    ]


def disturbance_of(steps: Sequence[tuple[float, int]], at: float, until: float, lost_steps: float) -> Disturbance:
    """What a kill at `at` cost, from (time, number) of the steps of one process up to `until`, ascending by time.

    Raises BenchmarkFailed where there is no step before or after it.
    """
    before = [one for one in steps if one[0] <= at]
    after = [one for one in steps if at < one[0] <= until]
    reached = max((number for _, number in before), default=0)
    beyond = [time_of for time_of, number in after if number > reached]
    if len(before) < 2 or not beyond:
        raise BenchmarkFailed(f"{len(before)} steps before the kill, {len(beyond)} new ones after it: too few")
    recent = before[-SETTLED_STEPS:]
    normal = statistics.median(later[0] - sooner[0] for sooner, later in pairwise(recent))
    line = [before[-1], *after]
    stall = max(later[0] - sooner[0] for sooner, later in pairwise(line))
    return Disturbance(
        normal_s=normal, stall_s=stall - normal, behind_s=beyond[0] - before[-1][0] - normal, lost_steps=lost_steps
    )


def wait_for(condition: Callable[[], bool], limit_s: float, what: str, child: Child) -> None:
    """Look until it holds. Raises BenchmarkFailed when late, or when the process that has to bring it about ends."""
    deadline = time.monotonic() + limit_s
    while not condition():
        if not child.running or time.monotonic() > deadline:
            state = "late" if child.running else f"ended with exit code {child.process.returncode}"
            raise BenchmarkFailed(f"{what}: {state}\n{child.tail()}")
        time.sleep(LOOK_EVERY_S)


def strike(pid: int, generator: random.Random) -> float:
    """SIGKILL at a random moment of a step; returns when."""
    time.sleep(generator.uniform(0.0, 3 * STEP_S))
    at = time.monotonic()
    os.kill(pid, signal.SIGKILL)
    return at


class ElasWave:
    """DP 4, workers restarted by their agents."""

    def __init__(self, place: Place, kills: int) -> None:
        self._events = place.folder("events")
        flags = ["--nnodes=4", "--nproc-per-node=1", "--dp=4", "--pp=1", f"--max-restarts={kills}"]
        self._job = place.launch(flags, "elaswave_rival.py", [f"--events={self._events}"])
        self._limit_s = START_LIMIT_S

    def disturb(self, generator: random.Random) -> Disturbance:
        """See System."""
        status = self._job.wait_steady(WORLD, SETTLE_STEPS, self._limit_s)
        victim = members(status)[generator.randrange(WORLD)]
        at = strike(victim.pid, generator)
        incident = self._job.wait_incident(victim.worker, BACK_LIMIT_S)
        self._job.wait_steady(WORLD, SETTLED_STEPS, BACK_LIMIT_S)
        first: dict[int, float] = {}
        for path in self._events.glob("*.jsonl"):
            for event in read_events(path):
                first[event.step] = min(event.at, first.get(event.step, event.at))
        steps = sorted((time_of, number) for number, time_of in first.items())
        lost = incident.redone_hops / incident.step_hops
        return disturbance_of(steps, at, time.monotonic(), lost)


class Torchrun:
    """DDP under torchrun, all workers restarted from a checkpoint."""

    CHECKPOINT_EVERY = 20

    def __init__(self, place: Place) -> None:
        self._events = place.folder("events")
        command = [
            *(sys.executable, "-c", _TORCHRUN, str(os.getpid()), "--nnodes=1", f"--nproc-per-node={WORLD}"),
            *("--max-restarts=100", "--rdzv-backend=c10d", "--rdzv-endpoint=127.0.0.1:0", "--local-addr=127.0.0.1"),
            *(str(JOBS / "torchrun_rank.py"), f"--events={self._events}"),
            f"--checkpoint-every={self.CHECKPOINT_EVERY}",
        ]
        # With the store shared over restarts, torch's default, gloo dials addresses of dead processes and often hangs.
        extra = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
        self._child = place.start(command, place.folder("torchrun") / "output.txt", extra)
        self._wait_settled(0.0)

    def disturb(self, generator: random.Random) -> Disturbance:
        """See System."""
        events = self._read(generator.randrange(WORLD))
        time.sleep(generator.uniform(0.0, self.CHECKPOINT_EVERY * STEP_S))  # anywhere between two checkpoints
        at = strike(events[-1].pid, generator)
        self._wait_settled(at)
        events = self._read(0)
        steps = [(event.at, event.step) for event in events if event.kind == "step"]
        again = next(event for event in events if event.kind == "ready" and event.at > at)
        reached = max(number for time_of, number in steps if time_of <= at)
        return disturbance_of(steps, at, time.monotonic(), reached + 1 - again.step)

    def _read(self, rank: int) -> list[Event]:
        return read_events(self._events / f"{rank}.jsonl")

    def _wait_settled(self, since: float) -> None:
        def is_settled() -> bool:
            for rank in range(WORLD):
                ready = [event.at for event in self._read(rank) if event.kind == "ready" and event.at > since]
                steps = [event for event in self._read(rank) if event.kind == "step" and event.at > since]
                if not ready or sum(event.at > ready[-1] for event in steps) < SETTLED_STEPS:
                    return False
            return True

        wait_for(is_settled, RESTART_LIMIT_S, "torchrun in steady training", self._child)


class TorchFT:
    """Four replica groups of one process, each restarted by us as soon as it has died."""

    def __init__(self, place: Place, python: Path) -> None:
        self._place = place
        self._python = str(python)
        self._events = place.folder("events")
        self._output = place.folder("torchft") / "output.txt"
        port = self._output.with_name("port")
        script = JOBS / "torchft_lighthouse.py"
        self._lighthouse = self._start(script, f"--out={port}")
        wait_for(port.exists, START_LIMIT_S, "TorchFT's lighthouse", self._lighthouse)
        self._address = f"http://127.0.0.1:{port.read_text()}"
        self._replicas = [self._start_replica(replica) for replica in range(WORLD)]
        self._wait_settled(0.0)

    def disturb(self, generator: random.Random) -> Disturbance:
        """See System."""
        victim = generator.randrange(WORLD)
        at = strike(self._replicas[victim].process.pid, generator)
        self._replicas[victim].wait(BACK_LIMIT_S)
        self._replicas[victim] = self._start_replica(victim)
        self._wait_settled(at)
        until = time.monotonic()
        found: list[Disturbance] = []
        for replica in set(range(WORLD)) - {victim}:
            events = [event for event in read_events(self._log(replica)) if event.kind == "step"]
            discarded = sum(at < event.at <= until and not event.committed for event in events)
            steps = [(event.at, event.step) for event in events if event.committed]
            found.append(disturbance_of(steps, at, until, discarded))
        return max(found, key=lambda one: one.stall_s)

    def _log(self, replica: int) -> Path:
        return self._events / f"{replica}.jsonl"

    def _start(self, script: Path, *flags: str) -> Child:
        return self._place.start([self._python, str(script), f"--parent={os.getpid()}", *flags], self._output)

    def _start_replica(self, replica: int) -> Child:
        flags = (f"--replica={replica}", f"--lighthouse={self._address}", f"--events={self._events}")
        return self._start(JOBS / "torchft_replica.py", *flags)

    def _wait_settled(self, since: float) -> None:
        def is_settled() -> bool:
            for replica in range(WORLD):
                events = read_events(self._log(replica))
                ready = [event.at for event in events if event.kind == "ready"]
                full = [
                    event
                    for event in events
                    if event.kind == "step" and event.committed and event.participants == WORLD
                ]
                if not ready or sum(event.at > max(since, ready[-1]) for event in full) < SETTLED_STEPS:
                    return False
            return True

        wait_for(is_settled, RESTART_LIMIT_S, "TorchFT in steady training", self._lighthouse)
