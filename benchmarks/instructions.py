"""What workers did and when, from the records of jobs/emulated.py, and what a loss changed in it.

Independent of what the system says about itself: the records are written by the model's layers.
"""

import random
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from elaswave.core.ids import MicroBatch, Step
from elaswave.core.samples import SampleOrder

RECORD = np.dtype([("at", "<f8"), ("sample", "<u4"), ("layer", "<u2"), ("backward", "u1"), ("end", "u1")])
"""As jobs/emulated.py writes them."""

SEED = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """One layer of one micro-batch of one step, in one direction."""

    step: int
    micro_batch: int
    layer: int
    backward: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Execution:
    """A worker ran a piece of work; CLOCK_MONOTONIC seconds. `ended` None: it died in the middle."""

    worker: int
    work: Work
    begun: float
    ended: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Samples:
    """Names the (step, micro-batch) of a sample of a job in which each sample is used once."""

    steps: int
    micro_batches: int

    def places(self, steps: Iterable[int]) -> dict[int, tuple[int, int]]:
        """(step, micro-batch) by sample, for these steps."""
        order = SampleOrder(
            seed=SEED, samples=self.steps * self.micro_batches, global_batch=self.micro_batches, micro_batch=1
        )
        return {
            int(order.sample_ids(Step(step), MicroBatch(micro_batch))[0]): (step, micro_batch)
            for step in steps
            if 0 <= step < self.steps
            for micro_batch in range(self.micro_batches)
        }


class Records:
    """All records of a job, read once."""

    def __init__(self, folder: Path) -> None:
        """Raises OSError. A record that its writer's death has cut short is left out."""
        self._of_worker: list[tuple[int, NDArray[np.void]]] = []
        for path in sorted(folder.glob("*.records")):
            content = path.read_bytes()
            records = np.frombuffer(content, dtype=RECORD, count=len(content) // RECORD.itemsize)
            self._of_worker.append((int(path.name.partition("-")[0]), records))

    def executions(self, places: Mapping[int, tuple[int, int]]) -> list[Execution]:
        """Those of the samples in `places`, in the order of their beginning."""
        wanted = np.fromiter(places, dtype=np.uint32, count=len(places))
        found: list[Execution] = []
        for worker, records in self._of_worker:
            open_work: dict[Work, float] = {}
            for at, sample, layer, backward, end in records[np.isin(records["sample"], wanted)].tolist():
                step, micro_batch = places[sample]
                work = Work(step=step, micro_batch=micro_batch, layer=layer, backward=bool(backward))
                if end:
                    found.append(Execution(worker=worker, work=work, begun=open_work.pop(work), ended=at))
                else:
                    open_work[work] = at
            found += [Execution(worker=worker, work=work, begun=at, ended=None) for work, at in open_work.items()]
        return sorted(found, key=lambda execution: execution.begun)


@dataclass(frozen=True, slots=True, kw_only=True)
class LossFacts:
    """What the records show of one loss. Seconds.

    resume_s: death to the first instruction that somebody else began in the dead worker's place. dead: instructions
    that the dead worker had begun or finished in steps which others had to go on with. redone: of these, run again by
    others. redone_of_others: instructions of survivors that were run a second time. longest_gaps: of each worker that
    neither took over work nor shared a pipeline with the dead one, the longest time between two instructions of one
    step that touches the time from death to resumption. After its last instruction of a step a worker waits for the
    step's end, which needs what the dead one has lost: that is the step's delay, and counted there. longest_holds: of
    the same gaps only the time in which the next instruction's input was there already: what stood still without need.
    """

    resume_s: float
    dead: int
    redone: int
    redone_of_others: int
    longest_gaps: Mapping[int, float]
    longest_holds: Mapping[int, float]


class Loss:
    """One death at a known time; `executions` from at least two steps before it to the end of the step it fell into."""

    def __init__(self, executions: Sequence[Execution], victim: int, at: float) -> None:
        self._executions = executions
        self._victim = victim
        self._at = at

    @cached_property
    def last_step(self) -> int | None:
        """The last step in which the dead worker had begun something; None where it never had."""
        return max((e.work.step for e in self._executions if e.worker == self._victim), default=None)

    @cached_property
    def place(self) -> frozenset[tuple[int, int]]:
        """(layer, micro-batch) of the dead worker in an undisturbed step; empty where steps before were not alike."""
        if self.last_step is None:
            return frozenset()
        assigned = [
            frozenset(
                (e.work.layer, e.work.micro_batch)
                for e in self._executions
                if e.worker == self._victim and e.work.step == step
            )
            for step in (self.last_step - 1, self.last_step - 2)
        ]
        return assigned[0] if assigned[0] == assigned[1] else frozenset()

    @cached_property
    def resumed_at(self) -> float | None:
        """When somebody else first began an instruction in the dead worker's place."""
        taken = (e.begun for e in self._executions if self._is_taken_over(e))
        return min(taken, default=None)

    def _is_taken_over(self, execution: Execution) -> bool:
        work = execution.work
        other = execution.worker != self._victim and execution.begun > self._at
        return other and (work.layer, work.micro_batch) in self.place

    def facts(self) -> LossFacts | None:
        """What the loss changed; None where the steps before it were not alike, or nobody took over in the records."""
        if self.last_step is None or not self.place or self.resumed_at is None:
            return None
        runs: dict[Work, list[Execution]] = {}
        for execution in self._executions:
            if execution.work.step >= self.last_step - 1:
                runs.setdefault(execution.work, []).append(execution)
        again = [found for found in runs.values() if len(found) > 1]
        redone = sum(found[0].worker == self._victim for found in again)
        dead = sum(e.worker == self._victim and e.work.step >= self.last_step for e in self._executions)
        return LossFacts(
            resume_s=self.resumed_at - self._at,
            dead=dead,
            redone=redone,
            redone_of_others=sum(len(found) - 1 for found in again) - redone,
            longest_gaps={
                worker: longest_gap(spans_of(self._executions, worker), self._at, self.resumed_at)
                for worker in sorted(self.bystanders())
            },
            longest_holds={
                worker: longest_gap(fed_spans_of(self._executions, worker), self._at, self.resumed_at)
                for worker in sorted(self.bystanders())
            },
        )

    def bystanders(self) -> frozenset[int]:
        """Workers with no superseded work: they took nothing over and shared no micro-batch with the dead one."""
        if self.last_step is None:
            return frozenset()
        before = [e for e in self._executions if e.work.step == self.last_step - 1]
        pipelines = {e.work.micro_batch for e in before if e.worker == self._victim}
        involved = {e.worker for e in before if e.work.micro_batch in pipelines}
        involved |= {e.worker for e in self._executions if self._is_taken_over(e)}
        return frozenset(e.worker for e in before) - involved


Spans = Sequence[tuple[float, float, int]]
"""(begin, end, step) of instructions, ascending."""


def spans_of(executions: Sequence[Execution], worker: int) -> list[tuple[float, float, int]]:
    """When this worker was busy with finished instructions."""
    return [(e.begun, e.ended, e.work.step) for e in executions if e.worker == worker and e.ended is not None]


def fed_spans_of(executions: Sequence[Execution], worker: int) -> list[tuple[float, float, int]]:
    """`spans_of`, where each span lasts until the input of the worker's next instruction is there."""
    ended = {e.work: e.ended for e in executions if e.ended is not None}
    layers = 1 + max((e.work.layer for e in executions), default=0)
    mine = [e for e in executions if e.worker == worker and e.ended is not None]
    spans = spans_of(executions, worker)
    for place, following in enumerate(mine[1:]):
        fed = ended.get(input_of(following.work, layers), 0.0)
        begin, end, step = spans[place]
        spans[place] = (begin, max(end, min(fed, following.begun)), step)
    return spans


def input_of(work: Work, layers: int) -> Work:
    """The piece of work that makes the input of this one; for the first layer, which loads samples, itself."""
    if not work.backward:
        return replace(work, layer=max(0, work.layer - 1))
    if work.layer == layers - 1:
        return replace(work, backward=False)
    return replace(work, layer=work.layer + 1)


def longest_gap(spans: Spans, start: float, stop: float) -> float:
    """The longest time between two instructions of one step that touches [start, stop]; 0 where there is none."""
    first = max(0, bisect_right(spans, start, key=lambda span: span[0]) - 1)
    last = min(len(spans) - 1, bisect_left(spans, stop, key=lambda span: span[0]))
    pairs = zip(spans[first:last], spans[first + 1 : last + 1], strict=True)
    gaps = (after[0] - before[1] for before, after in pairs if before[2] == after[2])
    return max(gaps, default=0.0)


def undisturbed_gaps(spans: Spans, length: float, count: int, generator: random.Random) -> list[float]:
    """`longest_gap` in windows of this length at `count` random places within the spans; empty for too few of them."""
    if not spans or spans[-1][1] - spans[0][0] <= length:
        return []
    starts = (generator.uniform(spans[0][0], spans[-1][1] - length) for _ in range(count))
    return [longest_gap(spans, start, start + length) for start in starts]
