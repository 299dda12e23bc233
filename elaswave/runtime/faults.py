"""Faults asked for on purpose, carried out by the worker itself at an exact place of a step."""

import os
import signal
import time
from collections.abc import Callable

from elaswave.core.ids import Step
from elaswave.core.injection import Injection


class FaultInjector:
    """Fires each injection once; those of a compute phase in the middle of the worker's own hops."""

    def __init__(self, before_death: Callable[[], None]) -> None:
        self._waiting: list[Injection] = []
        self._before_death = before_death
        self._seen: dict[tuple[int, str], int] = {}
        self.slow_factor = 1.0

    def add(self, injection: Injection) -> None:
        """Take an order; one without a step is carried out at the next instruction."""
        self._waiting.append(injection)

    def at(self, step: Step, phase: str, *, expected: int = 1, recovery: bool = False) -> None:
        """The worker is at a place where faults can strike. `expected`: how often this phase comes in the step.

        Neither counts work of repair: what is taken over on the way would move the middle behind the end.
        """
        if not self._waiting:
            return
        seen = self._seen.get((step, phase), 0) + (not recovery)
        self._seen[(step, phase)] = seen
        for injection in list(self._waiting):
            wanted = injection.phase in (phase, "any") and injection.during_recovery == recovery
            if injection.step is not None and (injection.step != step or not wanted):
                continue
            if injection.step is not None and not recovery and seen <= expected // 2:
                continue
            self._waiting.remove(injection)
            self._fire(injection)

    def _fire(self, injection: Injection) -> None:
        if injection.action == "slow":
            self.slow_factor = injection.factor
            return
        self._before_death()
        os.kill(os.getpid(), signal.SIGKILL if injection.action == "kill" else signal.SIGSTOP)

    def stretch(self, started: float) -> None:
        """Make the work since `started` (CLOCK_MONOTONIC) take as many times longer as was asked for."""
        if self.slow_factor > 1.0:
            extra = (time.monotonic() - started) * (self.slow_factor - 1.0)
            time.sleep(extra)  # stands in for a slow device; nothing waits for it to be over
