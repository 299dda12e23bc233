"""What the launcher shows while a job runs: one live line on a terminal, plain lines anywhere else."""

import sys
import time
from abc import ABC, abstractmethod
from collections import deque
from typing import TYPE_CHECKING, TextIO

from elaswave.core.events import Incident, ShowLine, StepResult
from elaswave.core.status import Finished, JobStatus
from elaswave.wire import WatchItem

if TYPE_CHECKING:
    from rich.text import Text

_PLAIN_INTERVAL_S = 1.0
_SPEED_STEPS = 20
_UNKNOWN = -1.0  # a phase of an incident that is not known
_AWAY_STATES = ("suspected", "fenced", "gone")


class Progress:
    """What is known of the running job, as one line."""

    def __init__(self) -> None:
        self._status: JobStatus | None = None
        self._result: StepResult | None = None
        self._arrivals: deque[tuple[float, int]] = deque(maxlen=_SPEED_STEPS + 1)

    def update(self, item: WatchItem, now: float) -> None:
        """Take in one item that arrived at `now` (CLOCK_MONOTONIC seconds)."""
        if isinstance(item, JobStatus):
            # After the last step workers leave one by one; the line keeps what the job ended with.
            if not self.done:
                self._status = item
        elif isinstance(item, StepResult):
            self._result = item
            self._arrivals.append((now, item.tokens))

    @property
    def done(self) -> bool:
        """Whether the newest step is the last one."""
        steps = 0 if self._status is None else self._status.steps
        return self._result is not None and steps > 0 and self._result.step + 1 >= steps

    def line(self) -> str:
        """`step 12/100  loss 2.345678  9876 tokens/s  8 workers  epoch 3`; what is not known yet is left out."""
        parts = []
        status, result = self._status, self._result
        if result is None:
            parts.append("starting" if status is None or not status.state else status.state)
        else:
            total = f"/{status.steps}" if status is not None and status.steps else ""
            parts += [f"step {result.step + 1}{total}", f"loss {result.loss:.6f}"]
            if result.skipped:
                parts.append("skipped")
            if speed := self.tokens_per_second():
                parts.append(f"{speed:.0f} tokens/s")
        if status is not None and status.workers:
            alive = sum(1 for worker in status.workers if worker.pid and worker.state not in _AWAY_STATES)
            parts += [f"{alive} worker{'' if alive == 1 else 's'}", f"epoch {status.epoch}"]
        return "  ".join(parts)

    def tokens_per_second(self) -> float:
        """Over the last steps; 0 where not known."""
        if len(self._arrivals) < 2:  # noqa: PLR2004 - a speed needs two points in time
            return 0.0
        seconds = self._arrivals[-1][0] - self._arrivals[0][0]
        tokens = sum(tokens for _, tokens in list(self._arrivals)[1:])
        return tokens / seconds if seconds > 0.0 else 0.0


def describe_incident(incident: Incident) -> str:
    """One line with cause and phases."""
    who = ("worker " if len(incident.workers) == 1 else "workers ") + ", ".join(map(str, incident.workers))
    phase = f" in {incident.phase}" if incident.phase else ""
    phases = "  ".join(
        f"{name} ?" if seconds == _UNKNOWN else f"{name} {seconds * 1000:.1f} ms"
        for name, seconds in (
            ("detect", incident.detect_s),
            ("plan", incident.plan_s),
            ("edit", incident.edit_s),
            ("repair", incident.repair_s),
            ("delay", incident.delay_s),
        )
    )
    work = f"{incident.redone_hops} of {incident.dead_hops} lost hops redone, {incident.step_hops} in the step"
    return (
        f"incident: {incident.cause}, {who}, step {incident.step + 1}{phase} ({incident.evidence}); "
        f"{phases}; {work}, {incident.bytes_moved} bytes moved; epoch {incident.epoch}: {incident.reason}"
    )


class Display(ABC):
    """Where a job is shown. `close` it; errors go to stderr, the rest to `show`."""

    @abstractmethod
    def show(self, item: WatchItem) -> None:
        """Something happened."""

    @abstractmethod
    def print_line(self, text: str) -> None:
        """A line that stays."""

    @abstractmethod
    def close(self) -> None:
        """Leave the terminal as it was. Idempotent."""


class PlainDisplay(Display):
    """Lines without control characters: at most one a second for steps, all others at once."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._progress = Progress()
        self._shown_at = float("-inf")

    def show(self, item: WatchItem) -> None:
        now = time.monotonic()
        self._progress.update(item, now)
        match item:
            case StepResult() if self._progress.done or now - self._shown_at >= _PLAIN_INTERVAL_S:
                self._shown_at = now
                self.print_line(self._progress.line())
            case Incident():
                self.print_line(describe_incident(item))
            case ShowLine():
                self.print_line(item.text)
            case _:
                pass

    def print_line(self, text: str) -> None:
        printable = "".join(c if c.isprintable() or c in "\n\t" else "?" for c in text)
        self._stream.write(f"{printable}\n")
        self._stream.flush()

    def close(self) -> None:
        self._stream.flush()


class LiveDisplay(Display):
    """One line at the bottom of a terminal that is drawn again, lines that stay above it."""

    def __init__(self, stream: TextIO) -> None:
        # Imported here: rich takes as long to import as everything else that the launcher needs.
        from rich.console import Console  # noqa: PLC0415
        from rich.live import Live  # noqa: PLC0415
        from rich.text import Text  # noqa: PLC0415

        self._make_text = Text
        self._progress = Progress()
        self._console = Console(file=stream, highlight=False)
        self._live = Live(
            get_renderable=self._render,
            console=self._console,
            refresh_per_second=8,
            redirect_stdout=False,
            redirect_stderr=False,
        )
        self._live.start()

    def show(self, item: WatchItem) -> None:
        self._progress.update(item, time.monotonic())
        if isinstance(item, Incident):
            self.print_line(describe_incident(item))
        elif isinstance(item, ShowLine):
            self.print_line(item.text)
        elif isinstance(item, Finished):
            self._live.refresh()

    def print_line(self, text: str) -> None:
        self._console.print(self._make_text(text))

    def close(self) -> None:
        self._live.stop()

    def _render(self) -> "Text":
        return self._make_text(self._progress.line(), no_wrap=True, overflow="ellipsis")


def open_display(stream: TextIO | None = None) -> Display:
    """The display that fits the stream (stderr by default)."""
    chosen = sys.stderr if stream is None else stream
    return LiveDisplay(chosen) if chosen.isatty() else PlainDisplay(chosen)
