"""Layers whose graphs hang together give the bits that they give behind a cut."""

import itertools
from collections.abc import Callable
from typing import ClassVar

import pytest
import torch
from numerics_harness import TIED, Bench, Embedding, Head, hop, same_bits, small_job
from torch import Tensor, nn
from torch.nn import functional

from elaswave.errors import UserCodeError
from elaswave.runtime.device import configure_numerics

ALL_CUTS = [cuts for count in (1, 2, 3) for cuts in itertools.combinations((1, 2, 3), count)]


@pytest.fixture(autouse=True)
def _numerics() -> None:
    configure_numerics()


class Residual(nn.Module):
    """Gives rows in order, so the next layer may join. The input is used twice: its gradient is a sum."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(16)
        self.inner = nn.Linear(16, 16)

    def forward(self, value: Tensor) -> Tensor:
        return value + functional.dropout(functional.gelu(self.inner(self.norm(value))), 0.2, self.training)


class OddGradient(torch.autograd.Function):
    """Keeps values and gradient, but its gradient lies transposed, one element off, in memory."""

    seen: ClassVar[list[tuple[object, ...]]] = []

    @staticmethod
    def forward(ctx: object, value: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def backward(ctx: object, gradient: Tensor) -> Tensor:
        OddGradient.seen.append((*gradient.stride(), gradient.data_ptr() % 64))
        room = torch.empty(gradient.numel() + 1, dtype=gradient.dtype)[1:]
        return room.view(gradient.transpose(-1, -2).shape).copy_(gradient.transpose(-1, -2)).transpose(-1, -2)


class Odd(Residual):
    def forward(self, value: Tensor) -> Tensor:
        return OddGradient.apply(super().forward(OddGradient.apply(value)))


class NoisyGradient(torch.autograd.Function):
    """Draws random numbers in its backward pass."""

    @staticmethod
    def forward(ctx: object, value: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def backward(ctx: object, gradient: Tensor) -> Tensor:
        return gradient * torch.rand_like(gradient)


class Noisy(Residual):
    def forward(self, value: Tensor) -> Tensor:
        return super().forward(NoisyGradient.apply(value))


class Detached(Residual):
    """Its parameters have gradients, its input has none."""

    def forward(self, value: Tensor) -> Tensor:
        return super().forward(value.detach())


class NoGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: object, value: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def backward(ctx: object, gradient: Tensor) -> None:
        return None


class Blocked(Residual):
    def forward(self, value: Tensor) -> Tensor:
        return super().forward(NoGradient.apply(value))


class OnlyFirst(Residual):
    """Its output is one of several of the same autograd node."""

    def forward(self, value: Tensor) -> Tensor:
        first, second = super().forward(torch.cat([value, value], 0)).chunk(2)
        return first if value.shape[0] else second


def segments_of(bench: Bench) -> int:
    """In how many graphs a hop of all layers runs."""
    bench.runner.forward(hop(0, 4), None)
    (kept,) = bench.runner._kept.values()
    bench.runner.discard(hop(0, 4))
    return len(kept)


@pytest.mark.parametrize("changes", [{}, {"tied": TIED}, {"parameter_dtype": "bfloat16"}], ids=str)
@pytest.mark.parametrize(
    ("middle", "segments"),
    [(Residual, 1), (Odd, 1), (Noisy, 1), (OnlyFirst, 1), (nn.Identity, 2), (Detached, 1), (Blocked, 1)],
)
def test_cuts_do_not_show(middle: Callable[[], nn.Module], segments: int, changes: dict[str, object]) -> None:
    bench = Bench(small_job(layers=[Embedding, middle, Residual, Head], **changes))
    assert segments_of(bench) == segments
    whole = bench.run()
    for cuts in ALL_CUTS:
        assert same_bits(bench.run(cuts), whole), cuts
    assert same_bits(bench.run(), whole), "also once it is known that layers cannot be joined"
    again = Bench(small_job(layers=[Embedding, middle, Residual, Head], recompute=True, **changes))
    assert same_bits(again.run(), whole)


@pytest.mark.parametrize("cuts", [(), (1,), (2,), (1, 2, 3)])
def test_a_gradient_is_brought_into_order_before_the_next_layer_sees_it(cuts: tuple[int, ...]) -> None:
    bench = Bench(small_job(layers=[Embedding, Odd, Odd, Head]))
    OddGradient.seen.clear()
    bench.run(cuts)
    assert OddGradient.seen[0::2] == [(128, 16, 1, 0)] * 2


class Restless(torch.autograd.Function):
    """Has a gradient where that of its output is zero."""

    @staticmethod
    def forward(ctx: object, value: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def backward(ctx: object, gradient: Tensor) -> Tensor:
        return gradient + 1.0


class Unasked(Residual):
    def forward(self, value: Tensor) -> Tensor:
        return Restless.apply(super().forward(value))


@pytest.mark.parametrize("blocking", [Detached, Blocked])
def test_no_gradient_by_an_input_counts_as_zero_and_goes_on(blocking: Callable[[], nn.Module]) -> None:
    bench = Bench(small_job(layers=[Embedding, Unasked, blocking, Head]))
    behind_cuts = bench.run((1, 2, 3))
    assert behind_cuts[0].any(), "the gradient of the embedding"
    for cuts in [(), *ALL_CUTS]:
        assert same_bits(bench.run(cuts), behind_cuts), cuts


class InPlace(nn.Module):
    def forward(self, value: Tensor) -> Tensor:
        return value.add_(1.0) * 2.0


@pytest.mark.parametrize("edges", [(0, 4), (0, 2, 4)])
def test_a_layer_must_not_change_the_output_of_the_one_before(edges: tuple[int, ...]) -> None:
    bench = Bench(small_job(layers=[Embedding, Residual, InPlace, Head]))
    value = None
    with pytest.raises(UserCodeError, match=r"layer 2 .*in.place"):
        for first, last in itertools.pairwise(edges):
            value = bench.runner.forward(hop(first, last), value).output


class RaisesBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: object, value: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def backward(ctx: object, gradient: Tensor) -> Tensor:
        raise ZeroDivisionError("backward")


class Raises(Residual):
    def forward(self, value: Tensor) -> Tensor:
        return RaisesBackward.apply(super().forward(value))


@pytest.mark.parametrize("place", [1, 2])
def test_an_error_of_a_backward_pass_names_its_layer(place: int) -> None:
    layers: list[Callable[[], nn.Module]] = [Embedding, Residual, Residual, Head]
    layers[place] = Raises
    bench = Bench(small_job(layers=layers))
    bench.runner.forward(hop(0, 4), None)
    with pytest.raises(UserCodeError, match=f"backward pass of layer {place} raised ZeroDivisionError"):
        bench.runner.backward(hop(0, 4), None)
