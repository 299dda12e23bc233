"""Signals that end a job."""

import signal
from collections.abc import Callable, Sequence
from types import FrameType


class Signals:
    """Notes signals from `install` on, so that none is lost before there is an event loop."""

    def __init__(self, numbers: Sequence[signal.Signals]) -> None:
        self._numbers = tuple(numbers)
        self._received: list[signal.Signals] = []
        self._listener: Callable[[], object] | None = None

    def install(self) -> None:
        """From now on the signals are noted here and do nothing else. Call it in the main thread."""
        for number in self._numbers:
            # nohup ignores SIGHUP for us, and means it.
            if number is not signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, self._note)

    def notify(self, listener: Callable[[], object]) -> None:
        """Call `listener` in the main thread for each signal, at once for those that have come."""
        self._listener = listener
        if self._received:
            listener()

    @property
    def first(self) -> signal.Signals | None:
        """The first one that came."""
        return self._received[0] if self._received else None

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._received.append(signal.Signals(number))
        if self._listener is not None:
            self._listener()
