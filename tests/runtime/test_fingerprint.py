"""The numeric fingerprint: equal where bits are, different where they are not, and quick."""

import pytest
import torch
from numerics_harness import TIED, Embedding, Head, Mixer, Tokens, in_fresh_process, small_job
from torch import Tensor, nn

from elaswave.core.parameters import block_layout
from elaswave.errors import ConfigError
from elaswave.job import SGD, Job
from elaswave.runtime.description import describe_parameters
from elaswave.runtime.device import CpuDevice, configure_numerics
from elaswave.runtime.fingerprint import fingerprint


@pytest.fixture(autouse=True)
def _numerics() -> None:
    configure_numerics()


def of(job: Job) -> str:
    return fingerprint(job, block_layout(describe_parameters(job)), CpuDevice())


def test_it_is_the_same_in_every_process() -> None:
    code = """
from numerics_harness import *
from elaswave.runtime.device import configure_numerics
configure_numerics()
import test_fingerprint
torch.manual_seed(3)
print(test_fingerprint.of(small_job(tied=TIED)))
"""
    assert in_fresh_process(code, OMP_NUM_THREADS="2").strip() == of(small_job(tied=TIED))


class CountedMixer(Mixer):
    calls = 0

    def forward(self, value: Tensor) -> Tensor:
        CountedMixer.calls += 1
        return super().forward(value)


def test_each_type_of_layer_runs_once() -> None:
    CountedMixer.calls = 0
    of(small_job(layers=[Embedding, *[CountedMixer] * 5, Head]))
    assert CountedMixer.calls == 1


class Narrow(nn.Linear):
    """Of one class with the others, but the sizes differ."""


def test_layers_of_other_sizes_are_of_another_type() -> None:
    layers = [Embedding, *(lambda size=size: Narrow(size, 16) for size in (16, 16)), lambda: Narrow(16, 32)]
    assert of(small_job(layers=layers)) != of(small_job(layers=[*layers[:3], lambda: Narrow(16, 40)]))


class OtherTokens(Tokens):
    """Another text behind the same sizes."""

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        tokens, target = super().__getitem__(index)
        return tokens.flip(0), target


@pytest.mark.parametrize(
    "changes",
    [
        {"seed": 6},
        {"parameter_dtype": "bfloat16"},
        {"accumulation": "float32"},
        {"quantum_exponent": -20},
        {"optimizer": SGD(lr=1.0)},
        {"layers": [Embedding, Mixer, nn.Tanh, Head]},
        {"data": OtherTokens()},
    ],
    ids="-".join,
)
def test_what_changes_bits_changes_it(changes: dict[str, object]) -> None:
    assert of(small_job(**changes)) != of(small_job())


class Slightly(torch.autograd.Function):
    """A kernel of another numeric class: the last bit of one gradient differs."""

    @staticmethod
    def forward(ctx: object, value: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def backward(ctx: object, gradient: Tensor) -> Tensor:
        changed = gradient.clone()
        changed.view(-1).view(torch.int32)[5] += 1
        return changed


def test_one_bit_of_one_gradient_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    before = of(small_job())
    plain = Mixer.forward
    monkeypatch.setattr(Mixer, "forward", lambda self, value: plain(self, Slightly.apply(value)))
    assert of(small_job()) != before


class Counting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, value: Tensor) -> Tensor:
        self.seen += 1
        return value


@pytest.mark.parametrize(
    ("layer", "buffer"), [(Counting, "seen"), (lambda: nn.BatchNorm1d(8), "running_mean")], ids=["own", "torch"]
)
def test_layers_that_change_their_buffers_are_refused(layer: type[nn.Module], buffer: str) -> None:
    with pytest.raises(ConfigError, match=f"layer 1 changes its buffer '{buffer}' in forward"):
        of(small_job(layers=[Embedding, layer, Head]))


def test_ties_are_possible() -> None:
    assert of(small_job(tied=TIED)) == of(small_job(tied=TIED))
