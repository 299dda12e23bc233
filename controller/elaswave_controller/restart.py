"""Restart of the whole job from a durable checkpoint, when every copy of some state is gone."""

from dataclasses import replace

from elaswave.core.config import ControllerConfig
from elaswave.core.ids import Epoch, WorkerId

_FENCE_LIMIT_S = 10.0  # a SIGKILLed process that is not gone by then sits in the kernel, and its node is unusable


class Restart:
    """Bookkeeping of generations: a generation ends when all its workers are known to be dead.

    A job that dies again without a step more than last time would do so for ever: it is ended instead.
    """

    def __init__(self, config: ControllerConfig, resume_from: str) -> None:
        self._config = config
        self._first_resume = resume_from
        self._waiting: set[WorkerId] = set()
        self._next_worker = config.first_worker
        self._best_step = -1
        self._step_at_restart = -1
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

    def saw_worker(self, worker: WorkerId) -> None:
        """A worker was started under this id."""
        self._next_worker = WorkerId(max(self._next_worker, worker + 1))

    def saw_step(self, step: int) -> None:
        """A step was decided."""
        self._best_step = max(self._best_step, step)

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

    def begin(self, workers: frozenset[WorkerId], now: float) -> None:
        """All `workers` are being killed."""
        self._waiting = set(workers)
        self._step_at_restart = self._best_step
        self.deadline = now + _FENCE_LIMIT_S

    def gone(self, worker: WorkerId) -> None:
        """The end of a worker is confirmed, or its node is."""
        self._waiting.discard(worker)

    def next_config(self, newest_epoch: Epoch) -> ControllerConfig:
        """All are gone: what the next generation's core is told. Ids and epochs go on."""
        self.deadline = None
        self.generation += 1
        return replace(
            self._config,
            allow_fresh_start=False,
            first_worker=self._next_worker,
            first_epoch=Epoch(newest_epoch + 1),
        )
