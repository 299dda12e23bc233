"""Complete gradients and their norms."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numerics_harness import same_bits

from elaswave.core.exact import exact_from_float, exact_to_float
from elaswave.core.facts import LossScalars
from elaswave.core.shape import CHUNK_ELEMENTS
from elaswave.errors import InvariantError
from elaswave.runtime.accumulation import Exact64Accumulation
from elaswave.runtime.reduction import reduce_shard, sum_of_squares


def random_gradient(chunks: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    scale = 10.0 ** torch.randint(-20, 15, (chunks * CHUNK_ELEMENTS,), generator=generator)
    return torch.randn(chunks * CHUNK_ELEMENTS, generator=generator) * scale


@pytest.mark.parametrize("chunks", [1, 2, 33])
def test_only_the_sums_of_chunks_are_rounded(chunks: int) -> None:
    gradient = random_gradient(chunks, chunks)
    total = exact_to_float(sum_of_squares(gradient) or 0)
    wanted = math.fsum(float(value) ** 2 for value in gradient)
    assert math.isclose(total, wanted, rel_tol=1e-13)


@given(st.integers(1, 80), st.lists(st.integers(1, 79), max_size=6), st.integers(0, 2**32))
def test_slicing_on_chunks_does_not_change_it(chunks: int, cuts: list[int], seed: int) -> None:
    gradient = random_gradient(chunks, seed)
    edges = [0, *sorted({cut for cut in cuts if cut < chunks}), chunks]
    # Fresh memory for each slice, as a received one has.
    parts = [
        sum_of_squares(gradient[left * CHUNK_ELEMENTS : right * CHUNK_ELEMENTS].clone())
        for left, right in itertools.pairwise(edges)
    ]
    assert sum(part or 0 for part in parts) == sum_of_squares(gradient)


def test_the_largest_and_smallest_numbers_count() -> None:
    gradient = torch.zeros(CHUNK_ELEMENTS)
    gradient[0], gradient[700] = 3.4e38, 1e-45
    assert sum_of_squares(gradient) == exact_from_float(float(gradient[0]) ** 2)
    gradient[0] = 0.0
    assert sum_of_squares(gradient) == exact_from_float(float(gradient[700]) ** 2)
    assert sum_of_squares(torch.zeros(0)) == 0


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_what_is_not_finite_has_no_norm(bad: float) -> None:
    gradient = torch.ones(3 * CHUNK_ELEMENTS)
    gradient[-1] = bad
    assert sum_of_squares(gradient) is None


def test_a_gradient_of_part_of_a_chunk_is_a_bug() -> None:
    with pytest.raises(InvariantError, match="1000 elements"):
        sum_of_squares(torch.zeros(1000))


def test_reducing_does_not_depend_on_order_or_grouping() -> None:
    accumulation = Exact64Accumulation(quantum_exponent=-44, micro_batches=6)
    parts = [accumulation.quantised(random_gradient(2, seed).clamp(-1, 1)) for seed in range(6)]
    loss = LossScalars(tokens=7)
    gradient, scalars = reduce_shard(accumulation, parts, 6, loss)
    grouped = [accumulation.combine(parts[4:]), accumulation.combine(parts[:4][::-1])]
    again, scalars_again = reduce_shard(accumulation, grouped, 6, loss)
    assert same_bits([gradient], [again])
    assert scalars == scalars_again
    assert scalars.finite
    assert scalars.loss == loss
    expected = np.mean([part.numpy() for part in parts], axis=0)
    assert np.allclose(gradient.numpy(), expected, rtol=1e-6)


def test_a_gradient_that_is_not_finite_says_so() -> None:
    accumulation = Exact64Accumulation(quantum_exponent=-44, micro_batches=2)
    bad = accumulation.quantised(torch.full((CHUNK_ELEMENTS,), float("inf")))
    _, scalars = reduce_shard(accumulation, [accumulation.zeros(CHUNK_ELEMENTS), bad], 2)
    assert not scalars.finite
    assert scalars.norm_squared == 0
    _, empty = reduce_shard(accumulation, [accumulation.zeros(0)], 2)
    assert empty.finite
