"""Which native communicators a layout has, and which of them a loss touches (docs/communicators.md)."""

import math
from collections.abc import Iterator, Sequence, Set
from dataclasses import dataclass
from typing import Literal

from elaswave.core.axes import Axes
from elaswave.core.ids import WorkerId

NativeGroupKind = Literal["row", "column", "stages"]


@dataclass(frozen=True, slots=True, kw_only=True)
class NativeGroup:
    """Members of one native communicator, ascending; two at least.

    row, column: of the grid that the replicas of one stage form; sums go along its rows, then along its columns.
    stages: everybody of `stage` and of the next one, whatever pipeline they are of: their activations and gradients.
    `place`: place on the axes other than dp and pp; only equal ones are together.
    """

    kind: NativeGroupKind
    stage: int
    place: int
    members: tuple[WorkerId, ...]


def grid_rows(replicas: int) -> int:
    """Rows of the squarest grid without gaps: 1 for a prime number of replicas, which then form one row."""
    return next(rows for rows in range(math.isqrt(replicas), 0, -1) if replicas % rows == 0)


def native_groups(axes: Axes, workers: Sequence[WorkerId]) -> tuple[NativeGroup, ...]:
    """All native communicators of a layout; `workers` in the order of their places on `axes`, which have dp and pp.

    One for each pair of neighbouring stages and not one for each edge: a communicator of two ranks takes as much
    memory as a large one, and its ranks connect when they first send.
    """
    found: list[NativeGroup] = []
    for place, columns in enumerate(_columns(axes, workers)):
        for stage, replicas in enumerate(columns):
            rows = grid_rows(len(replicas))
            width = len(replicas) // rows
            lines: list[tuple[NativeGroupKind, Sequence[WorkerId]]] = []
            lines += [("row", replicas[row * width : (row + 1) * width]) for row in range(rows)]
            lines += [("column", replicas[column::width]) for column in range(width)]
            if stage + 1 < len(columns):
                lines.append(("stages", (*replicas, *columns[stage + 1])))
            found += [
                NativeGroup(kind=kind, stage=stage, place=place, members=tuple(sorted(members)))
                for kind, members in lines
                if len(members) > 1
            ]
    return tuple(found)


def _columns(axes: Axes, workers: Sequence[WorkerId]) -> Iterator[tuple[tuple[WorkerId, ...], ...]]:
    """For each place on the axes other than dp and pp: the replicas of each stage, pipeline by pipeline."""
    stages = dict(zip(axes.names, axes.sizes, strict=True))["pp"]
    for origin in axes.places({"dp": 0, "pp": 0}):
        fixed = {name: where for name, where in axes.coordinates(origin).items() if name not in ("dp", "pp")}
        yield tuple(tuple(workers[at] for at in axes.places({**fixed, "pp": stage})) for stage in range(stages))


def touched(groups: Sequence[NativeGroup], lost: Set[WorkerId]) -> tuple[NativeGroup, ...]:
    """Those that have to be edited; all others are used on as they are, also by neighbours of the lost."""
    return tuple(group for group in groups if not lost.isdisjoint(group.members))
