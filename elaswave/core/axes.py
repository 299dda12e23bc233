"""Groups with named axes: places of workers in a layout, and the stage replica, which computes one stage together."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Final

from elaswave.core.ids import WorkerId
from elaswave.errors import InvariantError

LAYOUT_AXES: Final = ("dp", "pp", "tp")
"""Outermost first: consecutive places are one stage replica, consecutive stage replicas one pipeline."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Axes:
    """Named axes and their sizes, outermost first. A place is a number from 0 in row-major order of its coordinates."""

    names: tuple[str, ...]
    sizes: tuple[int, ...]

    def __post_init__(self) -> None:
        if (
            len(set(self.names)) != len(self.sizes)
            or len(self.names) != len(self.sizes)
            or min(self.sizes, default=1) < 1
        ):
            raise InvariantError(f"axes {self.names} of sizes {self.sizes}: names are distinct, sizes from 1")

    @property
    def size(self) -> int:
        """Number of places."""
        return math.prod(self.sizes)

    def coordinates(self, place: int) -> dict[str, int]:
        """Coordinates of a place, by axis."""
        if not 0 <= place < self.size:
            raise InvariantError(
                f"place {place} of axes {self.names} with sizes {self.sizes}: must be below {self.size}"
            )
        found: dict[str, int] = {}
        for name, size in zip(reversed(self.names), reversed(self.sizes), strict=True):
            place, found[name] = divmod(place, size)
        return found

    def places(self, fixed: Mapping[str, int]) -> tuple[int, ...]:
        """Places with these coordinates, ascending: one place where all axes are fixed, all places where none is."""
        sizes = dict(zip(self.names, self.sizes, strict=True))
        if any(not 0 <= where < sizes.get(name, 0) for name, where in fixed.items()):
            raise InvariantError(f"no place {dict(fixed)} on axes {self.names} of sizes {self.sizes}")
        found = []
        for where in product(*((fixed[n],) if n in fixed else range(size) for n, size in sizes.items())):
            place = 0
            for size, coordinate in zip(self.sizes, where, strict=True):
                place = place * size + coordinate
            found.append(place)
        return tuple(found)

    def along(self, axis: str, place: int) -> tuple[int, ...]:
        """Places that differ from `place` on this axis only, itself included: its group along the axis."""
        if axis not in self.names:
            raise InvariantError(f"no axis {axis!r} among {self.names}")
        return self.places({name: where for name, where in self.coordinates(place).items() if name != axis})


@dataclass(frozen=True, slots=True, kw_only=True)
class StageReplica:
    """Workers that compute one stage together, in the order of their places on `axes`."""

    workers: tuple[WorkerId, ...]
    axes: Axes

    def __post_init__(self) -> None:
        if len(self.workers) != self.axes.size:
            raise InvariantError(f"{len(self.workers)} workers on axes {self.axes.names} of sizes {self.axes.sizes}")

    def along(self, axis: str, worker: WorkerId) -> tuple[WorkerId, ...]:
        """The group of `worker` along an axis of the replica, in order."""
        return tuple(self.workers[place] for place in self.axes.along(axis, self.workers.index(worker)))


def stage_replicas(axes: Axes, workers: Sequence[WorkerId]) -> tuple[tuple[StageReplica, ...], ...]:
    """Stage replicas of each stage, pipeline by pipeline. `workers` in the order of their places on `axes`.

    `axes` have dp and pp; the others are the axes of a replica.
    """
    inner = tuple((name, size) for name, size in zip(axes.names, axes.sizes, strict=True) if name not in ("dp", "pp"))
    replica_axes = Axes(names=tuple(name for name, _ in inner), sizes=tuple(size for _, size in inner))
    sizes = dict(zip(axes.names, axes.sizes, strict=True))
    return tuple(
        tuple(
            StageReplica(
                workers=tuple(workers[place] for place in axes.places({"dp": pipeline, "pp": stage})), axes=replica_axes
            )
            for pipeline in range(sizes["dp"])
        )
        for stage in range(sizes["pp"])
    )
