"""Pairwise covering sets: few rows in which every pair of values of any two factors occurs together."""

import random
from collections.abc import Callable, Mapping, Sequence
from itertools import combinations

Row = Mapping[str, str]
Pair = tuple[tuple[str, str], tuple[str, str]]
Allowed = Callable[[Row], bool]

_CANDIDATES = 12


def all_pairs(factors: Mapping[str, Sequence[str]], allowed: Allowed) -> list[Row]:
    """Rows, each with a value of every factor, that cover each pair of values that an allowed row can hold.

    `allowed` judges rows that may lack factors: once it refuses some values it has to refuse whatever is added to them.
    The same rows for the same arguments. Raises ValueError where no row is allowed at all.
    """
    maker = _Maker(factors, allowed)
    if maker.complete({}) is None:
        raise ValueError("no combination of values is allowed")
    left = maker.possible_pairs()
    rows: list[Row] = []
    while left:
        row = maker.best_row(left)
        rows.append(row)
        left = [pair for pair in left if not holds(row, pair)]
    return rows


def holds(row: Row, pair: Pair) -> bool:
    """Whether both values of the pair are in the row."""
    return all(row[name] == value for name, value in pair)


class _Maker:
    def __init__(self, factors: Mapping[str, Sequence[str]], allowed: Allowed) -> None:
        self._factors = factors
        self._allowed = allowed
        self._random = random.Random(0)

    def possible_pairs(self) -> list[Pair]:
        """All pairs of values of two factors that an allowed row can hold, in a fixed order."""
        return [
            ((one, left), (two, right))
            for one, two in combinations(self._factors, 2)
            for left in self._factors[one]
            for right in self._factors[two]
            if self.complete({one: left, two: right}) is not None
        ]

    def complete(self, row: Row) -> Row | None:
        """Some allowed row with these values."""
        if not self._allowed(row):
            return None
        missing = next((name for name in self._factors if name not in row), None)
        if missing is None:
            return row
        for value in self._factors[missing]:
            found = self.complete({**row, missing: value})
            if found is not None:
                return found
        return None

    def best_row(self, left: Sequence[Pair]) -> Row:
        """The best of some rows, each with the first pair that is left."""
        candidates = [self._row(dict(left[0]), left) for _ in range(_CANDIDATES)]
        return max(candidates, key=lambda row: sum(holds(row, pair) for pair in left))

    def _row(self, row: dict[str, str], left: Sequence[Pair]) -> Row:
        missing = [name for name in self._factors if name not in row]
        self._random.shuffle(missing)
        for name in missing:
            gains = self._gains(row, name, left)
            fitting = (value for value in sorted(gains, key=lambda value: -gains[value]))
            row[name] = next(value for value in fitting if self.complete({**row, name: value}) is not None)
        return {name: row[name] for name in self._factors}

    def _gains(self, row: Row, name: str, left: Sequence[Pair]) -> dict[str, int]:
        """For every value of the factor, how many pairs of it with values of the row are left; shuffled."""
        values = list(self._factors[name])
        self._random.shuffle(values)
        gains = dict.fromkeys(values, 0)
        for one, two in left:
            for mine, other in ((one, two), (two, one)):
                if mine[0] == name and row.get(other[0]) == other[1]:
                    gains[mine[1]] += 1
        return gains
