"""Sums of contributions against integers of quanta."""

import random
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numerics_harness import same_bits, small_job
from torch import Tensor

from elaswave.errors import InvariantError
from elaswave.runtime.accumulation import (
    PIECE_ELEMENTS,
    Accumulation,
    Exact64Accumulation,
    Float32Accumulation,
    accumulation_of,
)
from elaswave.runtime.contribution import whole
from elaswave.runtime.kernels import KERNELS

floats = st.floats(width=32, allow_nan=False, allow_infinity=False)
small_floats = st.floats(-1.0, 1.0, width=32)
# Halves of quanta: where rounding to nearest has to look at the last bit.
ties = st.integers(-(2**22), 2**22).map(lambda half: half * 2.0**-45)
elements = st.one_of(floats, small_floats, ties)


def matrices(values: st.SearchStrategy[float]) -> st.SearchStrategy[list[list[float]]]:
    """Contributions of one to six micro-batches, all of the same length."""
    return st.integers(1, 5).flatmap(
        lambda width: st.lists(st.lists(values, min_size=width, max_size=width), min_size=1, max_size=6)
    )


class Oracle:
    """Integer quanta, exact rational arithmetic, one element at a time."""

    def __init__(self, exponent: int, micro_batches: int) -> None:
        self.quantum = Fraction(2) ** exponent
        limit = min(2**51, 2**53 // micro_batches) * self.quantum
        self.bound = Fraction(float(np.float32(float(limit))))
        if self.bound > limit:
            self.bound = Fraction(float(np.nextafter(np.float32(float(limit)), np.float32(0))))

    def quanta(self, value: float) -> int:
        return round(min(max(Fraction(value), -self.bound), self.bound) / self.quantum)

    def total(self, column: list[float]) -> Fraction:
        return sum(map(self.quanta, column), 0) * self.quantum

    def saturated(self, rows: list[list[float]]) -> int:
        return sum(abs(Fraction(value)) > self.bound for row in rows for value in row)


@pytest.fixture(params=["numpy", "compiled"], autouse=True)
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of this holds with compiled kernels and without."""
    if request.param == "compiled":
        if KERNELS is None:
            pytest.skip("the kernels are not compiled here")
        return
    for kind in (Exact64Accumulation, Float32Accumulation):
        monkeypatch.setitem(kind.__init__.__kwdefaults__, "kernels", None)


def summed(accumulation: Accumulation, rows: list[Tensor]) -> Tensor:
    accumulator = accumulation.empty(rows[0].numel())
    for index, row in enumerate(rows):
        accumulation.enter(accumulator, whole(row), first=index == 0)
    return accumulator


@given(matrices(elements), st.integers(-60, -20), st.integers(0, 300), st.randoms(use_true_random=False))
def test_exact64_equals_integer_arithmetic_in_any_order_and_grouping(
    rows: list[list[float]], exponent: int, spare: int, shuffled: random.Random
) -> None:
    micro_batches = len(rows) + spare
    oracle = Oracle(exponent, micro_batches)
    accumulation = Exact64Accumulation(quantum_exponent=exponent, micro_batches=micro_batches)
    order = rows[:]
    shuffled.shuffle(order)
    tensors = [torch.tensor(row, dtype=torch.float32) for row in order]
    cut = shuffled.randint(0, len(order))
    groups = [group for group in (tensors[:cut], tensors[cut:]) if group]
    total = accumulation.combine([summed(accumulation, group) for group in groups])
    expected = [oracle.total(list(column)) for column in zip(*rows, strict=True)]
    assert [Fraction(value) for value in total.tolist()] == expected
    assert accumulation.saturated == oracle.saturated(rows)
    mean = accumulation.to_gradient([total], micro_batches)
    assert mean.dtype == torch.float32
    with np.errstate(over="ignore"):
        assert mean.tolist() == [float(np.float32(float(value / micro_batches))) for value in expected]


@given(matrices(small_floats))
def test_bfloat16_contributions_are_added_as_the_values_they_are(rows: list[list[float]]) -> None:
    tensors = [torch.tensor(row, dtype=torch.bfloat16) for row in rows]
    accumulation = Exact64Accumulation(quantum_exponent=-44, micro_batches=8)
    assert same_bits([summed(accumulation, tensors)], [summed(accumulation, [tensor.float() for tensor in tensors])])


@pytest.mark.parametrize("bad", [float("inf"), float("-inf"), float("nan")])
def test_what_is_not_finite_stays_so_in_the_sum_and_saturates_nothing(bad: float) -> None:
    accumulation = Exact64Accumulation(quantum_exponent=-44, micro_batches=4)
    rows = [torch.tensor([1.0, bad, 2.0]), torch.tensor([1.0, 1.0, 1.0]), torch.tensor([1.0, -bad, 1.0])]
    for order in (rows, rows[::-1]):
        total = summed(accumulation, order)
        assert total[[0, 2]].tolist() == [3.0, 4.0]
        assert bool(total[1].isnan())
    assert accumulation.saturated == 0


def test_saturation_is_by_contribution_and_is_counted() -> None:
    accumulation = Exact64Accumulation(quantum_exponent=-44, micro_batches=16)
    assert accumulation.limit == 32.0
    total = summed(accumulation, [torch.tensor([33.0, -1e30, 32.0, 0.5])] * 16)
    assert total.tolist() == [512.0, -512.0, 512.0, 8.0]
    assert accumulation.saturated == 32


@pytest.mark.parametrize("length", [1, PIECE_ELEMENTS - 1, PIECE_ELEMENTS, PIECE_ELEMENTS + 1, 2 * PIECE_ELEMENTS + 7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pieces_do_not_show(length: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(length)
    rows = [(torch.randn(length, generator=generator) * 1e-3).to(dtype) for _ in range(3)]
    rows[1][-1] = 100.0
    accumulation = Exact64Accumulation(quantum_exponent=-44, micro_batches=16)
    rounder = 1.5 * 2.0**8
    naive = sum((row.clamp(-32, 32).double() + rounder) - rounder for row in rows)
    assert isinstance(naive, Tensor)
    total = summed(accumulation, rows)
    assert same_bits([total], [naive])
    assert same_bits([accumulation.to_gradient([total], 16)], [(naive / 16).float()])
    assert accumulation.saturated == 1


def test_rounding_to_the_quantum_is_to_nearest_even() -> None:
    quantum = 2.0**-44
    accumulation = Exact64Accumulation(quantum_exponent=-44, micro_batches=1)
    halves = torch.tensor([0.5, 1.5, 2.5, -0.5, -1.5, 0.75]) * quantum
    assert (accumulation.quantised(halves) / quantum).tolist() == [0, 2, 2, 0, -2, 1]


def test_float32_adds_plainly_and_depends_on_the_order() -> None:
    accumulation = Float32Accumulation()
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randn(1000, generator=generator) for _ in range(8)]
    total = summed(accumulation, rows)
    assert total.dtype == accumulation.dtype == torch.float32
    assert torch.allclose(total, torch.stack(rows).sum(0), atol=1e-5)
    assert not same_bits([total], [summed(accumulation, rows[::-1])])


def test_the_job_chooses() -> None:
    exact = accumulation_of(small_job(quantum_exponent=-30))
    assert isinstance(exact, Exact64Accumulation)
    assert exact.limit == 2.0**21
    assert isinstance(accumulation_of(small_job(accumulation="float32")), Float32Accumulation)


@pytest.mark.parametrize(
    "accumulation", [Exact64Accumulation(quantum_exponent=-44, micro_batches=1), Float32Accumulation()]
)
def test_lengths_that_differ_are_a_bug(accumulation: Accumulation) -> None:
    with pytest.raises(InvariantError, match="a contribution of 1 elements"):
        accumulation.enter(accumulation.zeros(4), whole(torch.zeros(1)), first=False)
    with pytest.raises(InvariantError, match="shape"):
        accumulation.combine([accumulation.zeros(4), accumulation.zeros(1)])


def test_combine_leaves_its_parts_alone_and_takes_empty_ones() -> None:
    accumulation = Exact64Accumulation(quantum_exponent=-44, micro_batches=2)
    parts = [torch.ones(3, dtype=torch.float64), torch.ones(3, dtype=torch.float64)]
    total = accumulation.combine(parts)
    total.zero_()
    assert [part.tolist() for part in parts] == [[1.0] * 3] * 2
    assert accumulation.to_gradient([accumulation.zeros(0)], 2).numel() == 0
