"""What all benchmarks share: options, statistics of paired runs, the table and its JSON form.

A benchmark prints one table. Each row is one figure taken several times: median and range, and where a target is set,
whether it is met. Ratios are formed run by run, between runs that followed each other, and only then summarised: so a
machine that is busier for a while disturbs both sides of a ratio.
"""

import argparse
import json
import math
import os
import platform
import signal
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Literal

QUICK_HELP = "few and short runs: ends within a minute on a quiet machine"


class BenchmarkFailed(Exception):
    """A measured system did not do its part; the message says which and shows the end of its output."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """What a row has to reach: its median, least or greatest figure at most (or, with `least`, at least) `limit`.

    A goal is printed like a target, but missing it is no failure.
    """

    of: Literal["median", "min", "max"]
    limit: float
    least: bool = False
    goal: bool = False

    def is_met(self, figures: Sequence[float]) -> bool:
        """Whether the figures reach it. There must be some."""
        value = {"median": statistics.median(figures), "min": min(figures), "max": max(figures)}[self.of]
        return value >= self.limit if self.least else value <= self.limit

    def __str__(self) -> str:
        return f"{'goal ' if self.goal else ''}{self.of} {'>=' if self.least else '<='} {self.limit:g}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One line of the table. No figures: it was not measured, and `note` says why."""

    what: str
    unit: str
    figures: Sequence[float] = ()
    target: Target | None = None
    note: str = ""

    @property
    def verdict(self) -> str:
        """ "yes", "NO" or, without a target or figures, "-"."""
        if self.target is None or not self.figures:
            return "-"
        return "yes" if self.target.is_met(self.figures) else "NO"

    def cells(self) -> tuple[str, ...]:
        """What the table shows."""
        if self.figures:
            numbers = (statistics.median(self.figures), min(self.figures), max(self.figures))
            shown = tuple(map(format_number, numbers))
        else:
            shown = ("-", "-", "-")
        target = str(self.target) if self.target is not None else ""
        return (self.what, str(len(self.figures)), *shown, self.unit, target, self.verdict, self.note)

    def values(self) -> dict[str, object]:
        """What the JSON file holds."""
        return {
            "what": self.what,
            "unit": self.unit,
            "figures": list(self.figures),
            "median": statistics.median(self.figures) if self.figures else None,
            "min": min(self.figures, default=None),
            "max": max(self.figures, default=None),
            "target": str(self.target) if self.target is not None else None,
            "met": {"yes": True, "NO": False, "-": None}[self.verdict],
            "note": self.note,
        }


HEADER = ("what", "n", "median", "min", "max", "unit", "target", "met", "note")
_RIGHT_ALIGNED = (1, 2, 3, 4)


def format_number(value: float) -> str:
    """Three significant digits at least, without an exponent: 1234, 56.7, 0.0123."""
    if not math.isfinite(value):
        return str(value)
    if value == 0 or (float(value).is_integer() and abs(value) < 1e6):
        return f"{value:.0f}"
    digits = max(0, 2 - math.floor(math.log10(abs(value))))
    return f"{value:.{min(digits, 6)}f}"


def format_table(rows: Sequence[Row]) -> str:
    """The table as text, with a line of headings; columns that are empty in all rows are left out."""
    lines = [HEADER, *(row.cells() for row in rows)]
    used = [index for index in range(len(HEADER)) if any(line[index] not in ("", "-") for line in lines[1:])]
    widths = {index: max(len(line[index]) for line in lines) for index in used}
    return "\n".join(
        "  ".join(
            line[index].rjust(widths[index]) if index in _RIGHT_ALIGNED else line[index].ljust(widths[index])
            for index in used
        ).rstrip()
        for line in lines
    )


def paired_ratios(ours: Sequence[float], theirs: Sequence[float]) -> tuple[float, ...]:
    """ours / theirs, round by round. Raises ValueError where the rounds do not pair up."""
    if len(ours) != len(theirs):
        raise ValueError(f"{len(ours)} figures cannot be paired with {len(theirs)}")
    return tuple(mine / other for mine, other in zip(ours, theirs, strict=True))


def quantile(values: Sequence[float], share: float) -> float:
    """The least value that at least `share` (0 to 1) of the values do not exceed. Raises ValueError for no values."""
    if not values:
        raise ValueError("no values, no quantile")
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, max(0, math.ceil(share * len(ordered)) - 1))]


def chance_limit(trials: int, probability: float, confidence: float = 0.99) -> int:
    """How many of `trials` independent events of this probability happen at most, with this confidence."""
    happened, cumulated = 0, 0.0
    while happened < trials:
        cumulated += math.comb(trials, happened) * probability**happened * (1 - probability) ** (trials - happened)
        if cumulated >= confidence:
            return happened
        happened += 1
    return trials


def alternate(systems: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Run each system once a round; figures by name.

    Rounds come in pairs of which the second has the order of the first reversed, so that a slow change of the machine
    favours nobody; each pair begins with another system.
    """
    names = list(systems)
    figures: dict[str, list[float]] = {name: [] for name in names}
    for number in range(rounds):
        start = (number // 2) % len(names)
        order = names[start:] + names[:start]
        for name in reversed(order) if number % 2 else order:
            figures[name].append(systems[name]())
            say(f"round {number + 1} of {rounds}: {name} {format_number(figures[name][-1])}")
    return figures


def say(text: str) -> None:
    """A line of progress, on stderr: stdout has the table only."""
    sys.stderr.write(f"{text}\n")
    sys.stderr.flush()


@dataclass(slots=True, kw_only=True)
class Options:
    """Options of every benchmark, and where its figures go."""

    name: str
    quick: bool
    json: Path | None
    seed: int
    started_at: float = field(default_factory=time.time)
    loads: list[float] = field(default_factory=lambda: [os.getloadavg()[0]])

    def finish(self, rows: Sequence[Row], notes: Sequence[str] = ()) -> None:
        """Print the table and write the JSON file, if one is wanted. Raises OSError."""
        self.loads.append(os.getloadavg()[0])
        print(format_table(rows))
        for note in notes:
            print(note)
        before, after = self.loads[0], self.loads[-1]
        print(f"load average {before:.2f} before, {after:.2f} after, {os.cpu_count()} cores")
        if self.json is not None:
            self.json.write_text(json.dumps(self._values(rows, notes), indent=1) + "\n")

    def _values(self, rows: Sequence[Row], notes: Sequence[str]) -> dict[str, object]:
        return {
            "benchmark": self.name,
            "quick": self.quick,
            "seed": self.seed,
            "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(self.started_at)),
            "seconds": time.time() - self.started_at,
            "load_average": {"before": self.loads[0], "after": self.loads[-1]},
            "cores": os.cpu_count(),
            "machine": platform.machine(),
            "python": platform.python_version(),
            "rows": [row.values() for row in rows],
            "notes": list(notes),
        }


def make_parser(description: str | None) -> argparse.ArgumentParser:
    """The parser of a benchmark, with the options that all have."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--quick", action="store_true", help=QUICK_HELP)
    parser.add_argument("--json", metavar="FILE", type=Path, help="write the figures to FILE")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="decides everything random (default: 0)")
    return parser


def options_of(name: str, found: argparse.Namespace) -> Options:
    """The options that all benchmarks have, from what `make_parser` has read."""
    return Options(name=name, quick=found.quick, json=found.json, seed=found.seed)


def _stop(number: int, frame: FrameType | None) -> None:
    del frame
    sys.exit(128 + number)


def run(main: Callable[[], None]) -> None:
    """Run a benchmark's `main` and end the process: with 1 and one message where a measured system failed.

    SIGTERM unwinds it as Ctrl-C does, so that it ends what it has started.
    """
    signal.signal(signal.SIGTERM, _stop)
    try:
        main()
    except BenchmarkFailed as error:
        sys.exit(f"benchmark failed: {error}")
