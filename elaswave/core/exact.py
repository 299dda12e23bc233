"""Exact sums of floating-point numbers: integers in units of 2^-1074, so any order and grouping gives the same."""

import math

import numpy as np
from numpy.typing import NDArray

_UNIT_EXPONENT = 1074  # 2^-1074 is the smallest positive float64; every finite float64 is a multiple of it.

Exact = int
"""A sum in units of 2^-1074. Addition of Exact values is ordinary integer addition."""


def exact_from_float(value: float) -> Exact:
    """The finite `value` without rounding. Raises ValueError for infinities and NaN."""
    if not math.isfinite(value):
        raise ValueError(f"cannot sum {value!r} exactly: the value must be finite")
    numerator, denominator = value.as_integer_ratio()
    return (numerator << _UNIT_EXPONENT) // denominator


def exact_from_array(values: NDArray[np.float64]) -> Exact:
    """Exact sum of finite float64 `values` of any shape. Raises ValueError for infinities and NaN."""
    flat = np.asarray(values, dtype=np.float64).ravel()
    if flat.size == 0:
        return 0
    if not np.isfinite(flat).all():
        raise ValueError("cannot sum exactly: some values are infinite or NaN")
    mantissas, exponents = np.frexp(flat)
    whole = np.ldexp(mantissas, 53).astype(np.int64)
    total = 0
    for exponent in np.unique(exponents):
        chosen = whole[exponents == exponent]
        # Halves keep each partial sum inside int64: 53-bit values split at bit 26, up to 2^36 of them.
        low = int((chosen & ((1 << 26) - 1)).sum())
        high = int((chosen >> 26).sum())
        shift = int(exponent) - 53 + _UNIT_EXPONENT
        part = (high << 26) + low
        # frexp normalises subnormals, so a negative shift only drops bits that are zero.
        total += part << shift if shift >= 0 else part >> -shift
    return total


def exact_to_float(total: Exact) -> float:
    """The float64 nearest to `total` (ties to even); infinity of the right sign where it is out of range."""
    try:
        return total / (1 << _UNIT_EXPONENT)
    except OverflowError:
        return math.inf if total > 0 else -math.inf
