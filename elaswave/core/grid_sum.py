"""A sum over a grid of workers by its rows, then by its columns, and the way round losses that makes no new group.

A loss breaks one row and one column. Whoever is left of a broken row hands its part to a whole row; whoever is in a
broken column is told the result by a neighbour in its row. Design section 8; see docs/communicators.md.
"""

from collections.abc import Sequence, Set
from dataclasses import dataclass
from itertools import chain

from elaswave.core.ids import WorkerId
from elaswave.errors import InvariantError

Grid = Sequence[Sequence[WorkerId]]
"""Rows of equal length, each worker once."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HandOver:
    """What `source` holds is added to what `target` holds; the source holds zero from then on."""

    source: WorkerId
    target: WorkerId


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupSum:
    """Every member of a row or column, none of them lost, gets the sum of what all of them hold."""

    members: tuple[WorkerId, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Tell:
    """`target` holds what `source` holds from then on."""

    source: WorkerId
    target: WorkerId


GridOperation = HandOver | GroupSum | Tell


def grid_sum(grid: Grid, lost: Set[WorkerId]) -> tuple[GridOperation, ...] | None:
    """Operations in order after which every worker that is not lost holds the sum of what all of these held.

    None where no row or no column is whole: links have to do it. Only rows and columns of the grid are used as groups.
    """
    workers = list(chain.from_iterable(grid))
    if len({len(row) for row in grid}) != 1 or len(set(workers)) != len(workers):
        raise InvariantError(
            f"a grid of rows {[list(row) for row in grid]}: rows are of equal length, each worker once"
        )
    columns = list(zip(*grid, strict=True))
    whole_rows = [row for row in grid if lost.isdisjoint(row)]
    whole_columns = [index for index, column in enumerate(columns) if lost.isdisjoint(column)]
    if not whole_rows or not whole_columns:
        return None
    return (
        *_handed_over(grid, whole_rows, lost),
        *(GroupSum(members=tuple(row)) for row in whole_rows if len(row) > 1),
        *(GroupSum(members=columns[index]) for index in whole_columns if len(grid) > 1),
        *_told(grid, whole_columns, lost),
    )


def _handed_over(grid: Grid, whole_rows: Sequence[Sequence[WorkerId]], lost: Set[WorkerId]) -> list[GridOperation]:
    """Broken rows take whole ones in turn, so that no row gets more than its share."""
    broken = [row for row in grid if not lost.isdisjoint(row)]
    return [
        HandOver(source=worker, target=whole_rows[number % len(whole_rows)][place])
        for number, row in enumerate(broken)
        for place, worker in enumerate(row)
        if worker not in lost
    ]


def _told(grid: Grid, whole_columns: Sequence[int], lost: Set[WorkerId]) -> list[GridOperation]:
    """Workers in broken columns take neighbours in whole ones in turn."""
    width = len(grid[0])
    broken = [index for index in range(width) if index not in whole_columns]
    return [
        Tell(source=row[whole_columns[number % len(whole_columns)]], target=row[index])
        for row in grid
        for number, index in enumerate(broken)
        if row[index] not in lost
    ]
