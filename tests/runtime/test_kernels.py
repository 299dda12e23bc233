"""Compiled passes: the same bits as numpy's and torch's, at any length, and nothing outside what they were given."""

import shutil
import sysconfig
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numerics_harness import TIED, same_bits, small_job
from torch import Tensor

from elaswave.core.ids import Step
from elaswave.core.shape import CHUNK_ELEMENTS
from elaswave.errors import InvariantError
from elaswave.job import AdamW
from elaswave.runtime import contribution, hops
from elaswave.runtime.accumulation import Accumulation, Exact64Accumulation, Float32Accumulation
from elaswave.runtime.contribution import BlockGradient, Spans
from elaswave.runtime.kernels import KERNELS, PLAIN_SUM, Kernels, addresses
from elaswave.runtime.optimizer import Update, Updater
from elaswave.runtime.reference import train_reference
from elaswave.runtime.shards import initial_state

compiled = pytest.mark.skipif(KERNELS is None, reason="the kernels are not compiled here")

SPECIAL = [0.0, -0.0, 1e-45, -1e-38, 3e38, -3e38, float("inf"), float("-inf"), float("nan"), 40.0, -1e-7]


def test_they_are_compiled_wherever_they_can_be() -> None:
    can = shutil.which("cc") and (Path(sysconfig.get_paths()["include"]) / "Python.h").exists()
    assert not can or KERNELS is not None, "there are a compiler and Python.h: run pip install -e . again"


def tensor_of(length: int, seed: int, dtype: torch.dtype) -> Tensor:
    """Values of all magnitudes, some of them special."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(length, generator=generator) * 10.0 ** torch.randint(-9, 3, (length,), generator=generator)
    for place in torch.randint(0, max(1, length), (length // 50,), generator=generator).tolist():
        values[place] = SPECIAL[place % len(SPECIAL)]
    return values.to(dtype)


def accumulations(kernels: Kernels | None) -> tuple[Accumulation, ...]:
    exact = Exact64Accumulation(quantum_exponent=-44, micro_batches=16, kernels=kernels)
    return exact, Float32Accumulation(kernels=kernels)


lengths = st.sampled_from([0, 1, 7, 64, 2047, 2048, 2049, 5000])


@compiled
@pytest.mark.parametrize("accumulation", ["exact64", "float32"])
@pytest.mark.parametrize("parameter_dtype", ["float32", "bfloat16"])
def test_a_training_ends_with_the_same_parameters(
    accumulation: str, parameter_dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = small_job(accumulation=accumulation, parameter_dtype=parameter_dtype, steps=3, tied=TIED, clip_norm=0.5)
    expected = train_reference(job)
    for module in (contribution, hops):
        monkeypatch.setattr(module, "KERNELS", None)
    for made in (Exact64Accumulation, Float32Accumulation, Updater):
        monkeypatch.setitem(made.__init__.__kwdefaults__, "kernels", None)
    assert train_reference(job) == expected


@compiled
@settings(max_examples=60, deadline=None)
@given(
    parts=st.lists(st.tuples(lengths, st.integers(0, 70)), min_size=1, max_size=5),
    missing=st.sets(st.integers(0, 4)),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    seed=st.integers(0, 2**20),
)
def test_contributions_have_the_same_bits(
    parts: list[tuple[int, int]], missing: set[int], dtype: torch.dtype, seed: int
) -> None:
    spans, end = [], 0
    for length, gap in parts:
        spans.append((end + gap, length))
        end += gap + length
    for ours, theirs in zip(accumulations(KERNELS), accumulations(None), strict=True):
        rooms = [torch.full((end + 16 + 3,), 7.0, dtype=kind.dtype) for kind in (ours, theirs)]
        for turn in range(3):
            values = tuple(
                None if index in missing and turn == 1 else tensor_of(length, seed + 10 * turn + index, dtype)
                for index, (length, _) in enumerate(parts)
            )
            given_ = BlockGradient(end + 3, Spans(spans), values, dtype)
            for accumulation, room in zip((ours, theirs), rooms, strict=True):
                accumulation.enter(room[8 : end + 8 + 3], given_, first=turn == 0)
        assert same_bits([rooms[0].nan_to_num(nan=5.0)], [rooms[1].nan_to_num(nan=5.0)])
        assert bool(rooms[0].isnan().eq(rooms[1].isnan()).all())
        assert rooms[0][:8].tolist() + rooms[0][end + 11 :].tolist() == [7.0] * 16
        assert ours.saturated == theirs.saturated


@compiled
@settings(max_examples=30, deadline=None)
@given(length=lengths, count=st.integers(1, 5), micro_batches=st.integers(1, 40), seed=st.integers(0, 2**20))
def test_means_have_the_same_bits(length: int, count: int, micro_batches: int, seed: int) -> None:
    for ours, theirs in zip(accumulations(KERNELS), accumulations(None), strict=True):
        parts = [torch.randn(length, dtype=ours.dtype) * 10.0 ** (seed % 9 - 4) for _ in range(count)]
        assert same_bits([ours.to_gradient(parts, micro_batches)], [theirs.to_gradient(parts, micro_batches)])


@compiled
@settings(max_examples=30, deadline=None)
@given(
    chunks=st.integers(1, 40),
    seed=st.integers(0, 2**20),
    decay=st.sampled_from([0.0, 0.1]),
    scale=st.sampled_from([1.0, 0.3]),
)
def test_adamw_has_the_same_bits(chunks: int, seed: int, decay: float, scale: float) -> None:
    optimizer = AdamW(lr=3e-3, weight_decay=decay)
    values = torch.randn(chunks * CHUNK_ELEMENTS, generator=torch.Generator().manual_seed(seed))
    states = [initial_state(optimizer, values) for _ in range(2)]
    for step in range(4):
        gradient = tensor_of(values.numel(), seed + step, torch.float32).nan_to_num(0.0, 1e30, -1e30)
        update = Update(step=Step(step), learning_rate=1e-2, gradient_scale=scale)
        for state, kernels in zip(states, (KERNELS, None), strict=True):
            Updater(optimizer, kernels=kernels).apply(state, gradient, update)
    ours, theirs = ([state.master, *state.moments] for state in states)
    assert same_bits([found.nan_to_num(5.0) for found in ours], [found.nan_to_num(5.0) for found in theirs])


@compiled
@pytest.mark.parametrize("spans", [[(0, 5)], [(0, 2), (1, 2)], [(-1, 2)], [(3, -1)], [(2**62, 4)]])
def test_spans_that_do_not_fit_are_refused(spans: list[tuple[int, int]]) -> None:
    assert KERNELS is not None
    total = torch.zeros(4)
    packed, values = Spans(spans).packed, (total,) * len(spans)
    with pytest.raises(ValueError, match=r"span [01] overlaps"):
        KERNELS.accumulate(total.data_ptr(), (4, packed, values, torch.float32, False), True, 0.0, PLAIN_SUM)
    assert total.tolist() == [0.0] * 4


@compiled
def test_numbers_that_do_not_fit_are_refused() -> None:
    assert KERNELS is not None
    total = torch.zeros(4)
    packed = Spans([(0, 4)]).packed
    with pytest.raises(ValueError, match="2 values for 1 spans"):
        KERNELS.accumulate(total.data_ptr(), (4, packed, (None, None), torch.float32, False), True, 0.0, PLAIN_SUM)
    with pytest.raises(ValueError, match="at least one part"):
        KERNELS.mean(total.data_ptr(), [], 4, 1.0, True)
    for vectors, constants in (([total.data_ptr()] * 4, bytes(8)), ([total.data_ptr()] * 3, bytes(36))):
        with pytest.raises(ValueError, match="must be 4, and 9 of float32"):
            KERNELS.adamw(vectors, 4, constants)
    for wrong in (torch.zeros(8)[::2], torch.zeros(3), torch.zeros(4, dtype=torch.float64)):
        with pytest.raises(ValueError, match=r"a kernel is given \d elements"):
            KERNELS.accumulate(total.data_ptr(), (4, packed, (wrong,), torch.float32, False), True, 0.0, PLAIN_SUM)
        with pytest.raises(InvariantError, match="a kernel is given"):
            addresses([wrong], torch.float32, 4)
