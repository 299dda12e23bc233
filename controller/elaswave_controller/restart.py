"""Restart of the whole job from a durable checkpoint, when every copy of some state is gone."""

from dataclasses import dataclass, replace

from elaswave.core.config import ControllerConfig
from elaswave.core.events import Incident
from elaswave.core.ids import Epoch, Step, WorkerId

_FENCE_LIMIT_S = 10.0  # a SIGKILLed process that is not gone by then sits in the kernel, and its node is unusable


_UNKNOWN = -1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class _Cause:
    began_at: float
    reason: str
    workers: tuple[WorkerId, ...]
    step: Step


class Restart:
    """Bookkeeping of generations: a generation ends when all its workers are known to be dead.

    A job that dies again without a step more than last time would do so for ever: it is ended instead.
    """

    def __init__(self, config: ControllerConfig, resume_from: str) -> None:
        self._config = config
        self._waiting: set[WorkerId] = set()
        self._first_worker = self._next_worker = config.first_worker
        self._best_step = -1
        self._step_at_restart = -1
        self._cause: _Cause | None = None
        self.resume_from = resume_from
        self.generation = 0
        self.deadline: float | None = None
        """CLOCK_MONOTONIC seconds by which all workers have to be gone; None while no restart is under way."""

    @property
    def under_way(self) -> bool:
        return self.deadline is not None

    @property
    def missing(self) -> frozenset[WorkerId]:
        """Workers whose end is not confirmed yet."""
        return frozenset(self._waiting)

    def is_past(self, worker: WorkerId) -> bool:
        """Whether it was a worker of an earlier generation, of which the core of this one knows nothing."""
        return worker < self._first_worker

    def saw_worker(self, worker: WorkerId) -> None:
        """A worker was started under this id."""
        self._next_worker = WorkerId(max(self._next_worker, worker + 1))

    def saw_step(self, step: Step, now: float) -> Incident | None:
        """A step was decided; the first one after a restart closes the restart's incident."""
        self._best_step = max(self._best_step, step)
        cause, self._cause = self._cause, None
        if cause is None:
            return None
        lasted = now - cause.began_at
        return Incident(
            epoch=Epoch(0),
            cause="restart",
            evidence=cause.reason,
            workers=cause.workers,
            step=cause.step,
            phase="",
            detect_s=_UNKNOWN,
            plan_s=_UNKNOWN,
            edit_s=_UNKNOWN,
            repair_s=lasted,
            resume_s=_UNKNOWN,
            delay_s=lasted,
            redone_hops=0,
            dead_hops=0,
            step_hops=0,
            bytes_moved=0,
            reason=f"all workers started again from {self.resume_from}",
        )

    def saw_checkpoint(self, folder: str) -> None:
        """A durable checkpoint is complete."""
        self.resume_from = folder

    def obstacle(self) -> str:
        """Why a restart is of no use; empty where it is."""
        if not self.resume_from:
            return "there is no durable checkpoint to go back to: use --save-every and --save-dir"
        if self.generation and self._best_step <= self._step_at_restart:
            return f"the job was restarted from {self.resume_from} before and got no step further"
        return ""

    def begin(self, workers: frozenset[WorkerId], reason: str, now: float) -> None:
        """All `workers` are being killed."""
        self._waiting = set(workers)
        step = Step(self._best_step + 1)
        self._cause = _Cause(began_at=now, reason=reason, workers=tuple(sorted(workers)), step=step)
        self._step_at_restart = self._best_step
        self.deadline = now + _FENCE_LIMIT_S

    def gone(self, worker: WorkerId) -> None:
        """The end of a worker is confirmed, or its node is."""
        self._waiting.discard(worker)

    def lack(self, workers: int) -> str:
        """Why the layout does not start again on `workers` workers of the nodes that are there; empty where it may."""
        needed = self._config.layout_workers
        if self._config.nodes_return or workers >= needed:
            return ""
        return (
            f"the nodes that are left have {workers} of the {needed} workers of the layout, and with --standalone lost "
            f"nodes do not come back: the same command goes on from {self.resume_from}"
        )

    def next_config(self, nodes: int) -> ControllerConfig:
        """All are gone: what the next generation's core is told. Worker ids go on, epochs begin again.

        nodes: how many are there. It waits for others only where they may come.
        """
        self.deadline = None
        self.generation += 1
        self._first_worker = self._next_worker
        nnodes = self._config.nnodes if self._config.nodes_return else nodes
        return replace(self._config, allow_fresh_start=False, first_worker=self._next_worker, nnodes=nnodes)
