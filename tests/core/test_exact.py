"""Exact sums against fractions."""

import math
import random
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from elaswave.core.exact import exact_from_array, exact_from_float, exact_to_float

UNIT = Fraction(1, 2**1074)
LARGEST = math.ldexp(2**53 - 1, 971)
finite = st.floats(allow_nan=False, allow_infinity=False)
lists = st.lists(finite, max_size=60)


@given(finite)
def test_a_float_is_kept_without_rounding(value: float) -> None:
    assert exact_from_float(value) * UNIT == Fraction(value)
    assert exact_to_float(exact_from_float(value)) == value


@given(lists)
def test_an_array_sums_like_fractions(values: list[float]) -> None:
    total = exact_from_array(np.array(values, dtype=np.float64))
    assert total * UNIT == sum(map(Fraction, values), Fraction(0))
    assert total == sum(map(exact_from_float, values))


@given(lists, st.randoms(use_true_random=False), st.integers(1, 7))
def test_any_order_and_grouping_gives_the_same(values: list[float], rng: random.Random, parts: int) -> None:
    shuffled = values.copy()
    rng.shuffle(shuffled)
    grouped = sum(exact_from_array(np.array(shuffled[part::parts])) for part in range(parts))
    assert grouped == exact_from_array(np.array(values))


@given(lists)
def test_the_nearest_float_of_a_sum(values: list[float]) -> None:
    total = sum(map(Fraction, values), Fraction(0))
    found = exact_to_float(exact_from_array(np.array(values)))
    try:
        assert found == float(total)
    except OverflowError:
        assert math.isinf(found)
        assert (found > 0) == (total > 0)


@given(st.integers(-(2**1200), 2**1200))
def test_rounding_is_to_even_at_any_place(units: int) -> None:
    assert exact_to_float(units) == float(units * UNIT)


def test_signs_and_ends_of_the_range() -> None:
    assert exact_to_float(exact_from_float(LARGEST) * 2) == math.inf
    assert exact_to_float(-exact_from_float(LARGEST) * 2) == -math.inf
    assert exact_from_float(5e-324) == 1
    assert exact_from_float(-0.0) == 0
    assert exact_from_array(np.zeros((0, 3))) == 0
    assert exact_from_array(np.full((3, 5), LARGEST)) == 15 * exact_from_float(LARGEST)


def test_many_equal_exponents_do_not_overflow() -> None:
    values = np.full(300_000, 2.0**53 - 1)
    assert exact_from_array(values) * UNIT == 300_000 * (2**53 - 1)
    assert exact_from_array(-values) == -exact_from_array(values)


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_what_is_not_finite_is_refused(bad: float) -> None:
    with pytest.raises(ValueError, match="exactly"):
        exact_from_float(bad)
    with pytest.raises(ValueError, match="infinite or NaN"):
        exact_from_array(np.array([1.0, bad]))
