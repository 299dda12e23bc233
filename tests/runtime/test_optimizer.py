"""Updates of shards: independent of slicing, as torch's, and rounded operation by operation."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numerics_harness import same_bits, small_job
from torch import Tensor

from elaswave.core.exact import exact_from_float
from elaswave.core.facts import Decision, LossScalars, NonFinite
from elaswave.core.ids import Layer, MicroBatch, Step
from elaswave.core.shape import CHUNK_ELEMENTS
from elaswave.errors import InvariantError, NonFiniteError, ProtocolError
from elaswave.job import SGD, AdamW, Optimizer, WarmupCosine
from elaswave.runtime.optimizer import PIECE_ELEMENTS, Update, Updater, clip_scale, gradient_norm, update_of
from elaswave.runtime.shards import (
    ShardState,
    initial_state,
    parameters_of,
    state_bytes,
    state_from_bytes,
    state_rows,
)

OPTIMIZERS = [
    AdamW(lr=1e-2, betas=(0.9, 0.95), weight_decay=0.1),
    AdamW(lr=1e-3, betas=(0.0, 0.0), eps=1e-6, weight_decay=0.0),
    SGD(lr=1e-2),
    SGD(lr=1e-2, momentum=0.9, weight_decay=0.01),
]


def vector(chunks: int, seed: int) -> Tensor:
    return torch.randn(chunks * CHUNK_ELEMENTS, generator=torch.Generator().manual_seed(seed))


def update(step: int, *, scale: float = 1.0, rate: float = 1e-2) -> Update:
    return Update(step=Step(step), learning_rate=rate, gradient_scale=scale)


def trained(optimizer: Optimizer, values: Tensor, gradients: list[Tensor]) -> ShardState:
    state, updater = initial_state(optimizer, values), Updater(optimizer)
    for step, gradient in enumerate(gradients):
        updater.apply(state, gradient, update(step, scale=0.7 if step % 2 else 1.0))
    return state


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@settings(max_examples=25)
@given(chunks=st.integers(1, 70), cuts=st.lists(st.integers(1, 69), max_size=5), seed=st.integers(0, 2**32))
def test_slicing_on_chunks_does_not_show(optimizer: Optimizer, chunks: int, cuts: list[int], seed: int) -> None:
    values, gradients = vector(chunks, seed), [vector(chunks, seed + step) * 1e-3 for step in range(1, 4)]
    whole = trained(optimizer, values, gradients)
    edges = [0, *sorted({cut for cut in cuts if cut < chunks}), chunks]
    for left, right in itertools.pairwise(edges):
        part = slice(left * CHUNK_ELEMENTS, right * CHUNK_ELEMENTS)
        # Gradients that came over a link lie anywhere.
        received = [torch.cat([torch.zeros(1), gradient[part]])[1:] for gradient in gradients]
        state = trained(optimizer, values[part], received)
        assert same_bits([state.master, *state.moments], [whole.master[part], *(m[part] for m in whole.moments)])


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_it_is_what_torch_does(optimizer: Optimizer) -> None:
    values, gradients = vector(40, 0), [vector(40, step) * 0.1 for step in range(1, 8)]
    parameter = torch.nn.Parameter(values.clone())
    theirs = torchs(optimizer, parameter)
    for step, gradient in enumerate(gradients):
        parameter.grad = gradient * (0.7 if step % 2 else 1.0)
        theirs.step()
    ours = trained(optimizer, values, gradients)
    assert torch.allclose(ours.master, parameter.data, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(ours.master, values, atol=1e-3)


def torchs(optimizer: Optimizer, parameter: torch.nn.Parameter) -> torch.optim.Optimizer:
    if isinstance(optimizer, SGD):
        return torch.optim.SGD([parameter], lr=1e-2, momentum=optimizer.momentum, weight_decay=optimizer.weight_decay)
    return torch.optim.AdamW(
        [parameter], lr=1e-2, betas=optimizer.betas, eps=optimizer.eps, weight_decay=optimizer.weight_decay
    )


def test_every_operation_of_adamw_is_rounded_by_itself() -> None:
    """Against scalars: no fused multiply-add, and a square root that is rounded correctly."""
    settings = AdamW(lr=1e-2, betas=(0.9, 0.95), weight_decay=0.1)
    # Parameters no larger than their changes, so that no rounding error is lost in the last subtraction.
    values, gradients = vector(1, 3) * 1e-3, [vector(1, 4) * 1e-2, vector(1, 5) * 1e-4]
    state = trained(settings, values, gradients)
    single = np.float32
    for place in range(0, CHUNK_ELEMENTS, 13):
        master, average, square = single(values[place]), single(0), single(0)
        for step, scale in enumerate((1.0, 0.7)):
            gradient = single(gradients[step][place]) * single(scale)
            square = square * single(0.95) + gradient * gradient * single(1 - 0.95)
            average = average * single(0.9) + gradient * single(1 - 0.9)
            root = single(math.sqrt(float(square)))
            divisor = root * single(1 / math.sqrt(1 - 0.95 ** (step + 1))) + single(1e-8)
            change = average * single(1e-2 / (1 - 0.9 ** (step + 1))) / divisor
            master = master * single(1 - 1e-2 * 0.1) - change
        assert (float(state.master[place]), float(state.moments[0][place]), float(state.moments[1][place])) == (
            float(master), float(average), float(square)
        )  # fmt: skip


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_skipped_step_changes_nothing_and_padding_stays_zero(optimizer: Optimizer) -> None:
    values = vector(1, 1)
    values[1000:] = 0.0
    gradient = vector(1, 2)
    gradient[1000:] = 0.0
    state, updater = initial_state(optimizer, values), Updater(optimizer)
    updater.apply(state, gradient, Update(step=Step(0), learning_rate=1.0, gradient_scale=0.5, skip=True))
    assert same_bits([state.master, *state.moments], [values, *(torch.zeros_like(values) for _ in state.moments)])
    updater.apply(state, gradient, update(1))
    assert not torch.equal(state.master, values)
    assert not state.master[1000:].any()


def test_the_gradient_is_not_changed_and_must_fit() -> None:
    optimizer = OPTIMIZERS[0]
    state, updater, gradient = initial_state(optimizer, vector(1, 0)), Updater(optimizer), vector(1, 1)
    before = gradient.clone()
    updater.apply(state, gradient, update(0, scale=0.3))
    assert torch.equal(gradient, before)
    for wrong in (vector(2, 1), gradient.double()):
        with pytest.raises(InvariantError, match="gradient has"):
            updater.apply(state, wrong, update(0))


def test_empty_shards_are_updated_too() -> None:
    for optimizer in OPTIMIZERS:
        state = trained(optimizer, torch.zeros(0), [torch.zeros(0)])
        assert state.serialised().numel() == 0
        assert parameters_of(state, torch.bfloat16).numel() == 0


# ------------------------------------------------------------------ decisions


def decision(norm: float = 3.0, *, finite: bool = True, bad: NonFinite | None = None, step: int = 4) -> Decision:
    return Decision(
        step=Step(step), norm_squared=exact_from_float(norm * norm), finite=finite, loss=LossScalars(non_finite=bad)
    )


def test_the_norm_is_clipped_to_the_limit() -> None:
    assert clip_scale(exact_from_float(9.0), None) == 1.0
    assert clip_scale(exact_from_float(9.0), 3.0) == 1.0
    assert clip_scale(exact_from_float(9.0), 1.5) == 0.5
    assert clip_scale(0, 1.0) == 1.0
    assert gradient_norm(exact_from_float(2.0)) == math.sqrt(2.0)


def test_an_update_is_a_function_of_job_and_decision() -> None:
    job = small_job(clip_norm=1.5, schedule=WarmupCosine(total_steps=10, warmup_steps=8))
    found = update_of(job, decision())
    assert found == Update(step=Step(4), learning_rate=1e-2 * 5 / 8, gradient_scale=0.5, skip=False)


@pytest.mark.parametrize(
    ("case", "place"),
    [
        (decision(bad=NonFinite(micro_batch=MicroBatch(2), layer=Layer(1))), "output of layer 1 for micro-batch 2"),
        (decision(finite=False), "a gradient"),
    ],
)
def test_the_policy_for_what_is_not_finite(case: Decision, place: str) -> None:
    with pytest.raises(NonFiniteError, match=f"step 4: .*{place} is infinite or not a number"):
        update_of(small_job(), case)
    assert update_of(small_job(non_finite="skip-step"), case).skip
    assert not update_of(small_job(non_finite="skip-step"), decision()).skip


# ------------------------------------------------------------------ serialised state


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_state_survives_a_journey(optimizer: Optimizer) -> None:
    state = trained(optimizer, vector(3, 0), [vector(3, 1), vector(3, 2)])
    sent = state.serialised()
    assert sent.dtype == torch.uint8
    assert sent.numel() == state_bytes(optimizer, 3 * CHUNK_ELEMENTS) == state_rows(optimizer) * 3 * CHUNK_ELEMENTS * 4
    assert sent.data_ptr() == state.master.data_ptr()
    room = torch.empty(sent.numel() + 1, dtype=torch.uint8)
    back = state_from_bytes(optimizer, 3 * CHUNK_ELEMENTS, room[1:].copy_(sent))
    assert same_bits([back.master, *back.moments], [state.master, *state.moments])
    copied = state.copy()
    Updater(optimizer).apply(state, vector(3, 3), update(2))
    assert same_bits([back.master, *back.moments], [copied.master, *copied.moments])
    assert not torch.equal(back.master, state.master)


def test_state_of_another_length_is_refused() -> None:
    adamw, sgd = OPTIMIZERS[0], OPTIMIZERS[2]
    sent = initial_state(sgd, vector(1, 0)).serialised()
    with pytest.raises(ProtocolError, match=r"4096 elements of torch\.uint8: must be 12288 bytes"):
        state_from_bytes(adamw, CHUNK_ELEMENTS, sent)
    with pytest.raises(ProtocolError, match="must be 4096 bytes"):
        state_from_bytes(sgd, CHUNK_ELEMENTS, sent.view(torch.float32))


def test_published_parameters_are_rounded_once_and_float32_is_not_copied() -> None:
    state = initial_state(OPTIMIZERS[0], vector(1, 0))
    assert parameters_of(state, torch.float32).data_ptr() == state.master.data_ptr()
    assert same_bits([parameters_of(state, torch.bfloat16)], [state.master.bfloat16()])


def test_more_than_one_piece_is_tested() -> None:
    assert PIECE_ELEMENTS < 69 * CHUNK_ELEMENTS
