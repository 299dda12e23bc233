"""What the shell needs of the pure core; tests put a scripted one in its place."""

from collections.abc import Callable
from typing import Protocol

from elaswave.core.config import ControllerConfig
from elaswave.core.events import Effect, Event
from elaswave.core.status import JobStatus


class Core(Protocol):
    """All decisions: see elaswave.core.controller.Controller. Times are CLOCK_MONOTONIC seconds."""

    def handle(self, event: Event, now: float) -> list[Effect]:
        """What is to be done about `event`, in this order."""

    def next_deadline(self) -> float | None:
        """When a Tick is wanted at the latest."""

    def status(self) -> JobStatus:
        """The job as the core sees it; pids and the job's name are filled in by the shell."""


CoreFactory = Callable[[ControllerConfig], Core]
