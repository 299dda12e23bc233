"""Which reports of decided steps the controller needs, and when."""

from collections import deque
from collections.abc import Callable
from typing import Final, Generic, TypeVar

from elaswave.core.ids import Step, WorkerId

REMEMBERED_STEPS: Final = 16
"""Workers of one job are one or two steps apart."""

Message = TypeVar("Message")


class StepReports(Generic[Message]):
    """Passes on the first report of each step at once, and of repetitions, when asked, each worker's last one.

    All workers tell the same of a step: that others have reached it, too, is of interest now and then only, while
    each message costs the controller a millisecond.
    """

    def __init__(self, send: Callable[[Message], None]) -> None:
        self._send = send
        self._told: dict[WorkerId, deque[Step]] = {}
        self._repetitions: dict[WorkerId, Message] = {}

    def take(self, worker: WorkerId, step: Step, message: Message) -> None:
        """`worker` reports `step`."""
        # Not by the highest step: a worker that learns a decision from others may leave out the step before it.
        repeated = any(step in told for other, told in self._told.items() if other != worker)
        self._told.setdefault(worker, deque(maxlen=REMEMBERED_STEPS)).append(step)
        if repeated:
            self._repetitions[worker] = message
        else:
            self._repetitions.pop(worker, None)
            self._send(message)

    def tell_repetitions(self) -> None:
        """Pass on how far the others have come."""
        repetitions, self._repetitions = self._repetitions, {}
        for message in repetitions.values():
            self._send(message)

    def forget(self, worker: WorkerId) -> None:
        """It has ended. What it told counts no more: after a restart of the job, steps come again."""
        self._told.pop(worker, None)
        self._repetitions.pop(worker, None)
