"""What a job's model looks like, and the digest of what decides the bits."""

import functools

import pytest
import torch
from numerics_harness import TIED, Embedding, Head, Mixer, Tokens, in_fresh_process, next_token_loss, small_job
from torch import Tensor, nn

from elaswave.core.ids import Layer
from elaswave.errors import ConfigError, UserCodeError
from elaswave.job import AdamW, Constant, WarmupCosine
from elaswave.runtime.description import build_layer, describe_job, describe_parameters


def names(**changes: object) -> list[list[tuple[str, tuple[int, ...], int]]]:
    return [
        [(found.name, found.shape, found.tie_group) for found in layer]
        for layer in describe_parameters(small_job(**changes))
    ]


def test_parameters_are_listed_in_order_with_their_ties() -> None:
    mixer = [
        ("norm.weight", (16,), 0), ("norm.bias", (16,), 0), ("up.weight", (48, 16), 0), ("up.bias", (48,), 0),
        ("down.weight", (16, 48), 0), ("down.bias", (16,), 0),
    ]  # fmt: skip
    assert names() == [[("table.weight", (32, 16), 0)], mixer, mixer, [("scores.weight", (32, 16), 0)]]
    assert names(tied=TIED)[0] == [("table.weight", (32, 16), 1)]
    assert names(tied=TIED)[3] == [("scores.weight", (32, 16), 1)]


def test_modules_and_factories_are_described_alike() -> None:
    assert names(layers=[Embedding(), Mixer(), Mixer(), Head()]) == names()
    assert names(layers=[functools.partial(nn.Linear, 4, 2)]) == [[("weight", (2, 4), 0), ("bias", (2,), 0)]]


class Counted(nn.Linear):
    real = 0

    def __init__(self) -> None:
        super().__init__(4, 4)
        Counted.real += not self.weight.is_meta


def test_factories_are_not_built_for_a_description() -> None:
    Counted.real = 0
    describe_job(small_job(layers=[Counted]))
    assert Counted.real == 0
    build_layer(small_job(layers=[Counted]), Layer(0))
    assert Counted.real == 1


class ReadsValues(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        size = int(torch.ones(3).sum())
        self.weight = nn.Parameter(torch.zeros(size))


def test_a_factory_that_reads_values_is_built_for_real() -> None:
    assert names(layers=[ReadsValues]) == [[("weight", (3,), 0)]]


def test_layers_are_built_from_seed_and_place_alone() -> None:
    torch.manual_seed(1)
    first = [build_layer(small_job(), Layer(index)) for index in (1, 2)]
    torch.manual_seed(2)
    state = torch.get_rng_state()
    again = build_layer(small_job(), Layer(1))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first[0].up.weight, again.up.weight)
    assert not torch.equal(first[0].up.weight, first[1].up.weight)
    assert not torch.equal(build_layer(small_job(seed=6), Layer(1)).up.weight, again.up.weight)


def test_built_modules_are_copied() -> None:
    module = Mixer()
    built = build_layer(small_job(layers=[module]), Layer(0))
    built.up.weight.data.zero_()
    assert module.up.weight.any()


# ------------------------------------------------------------------ what cannot be placed


def shared_layers() -> list[nn.Module]:
    first, last = Embedding(), Head()
    last.scores.weight = first.table.weight
    return [first, last]


def complex_layer() -> nn.Module:
    module = nn.Module()
    module.weight = nn.Parameter(torch.zeros(2, dtype=torch.complex64))
    return module


def fails() -> nn.Module:
    raise KeyError("size")


BAD = [
    ({"layers": shared_layers()}, r"layers 0 and 1 share a parameter .* declare it in Job.tied as \[\(0, 'table"),
    ({"layers": [lambda: nn.LazyLinear(3)]}, "'weight' of layer 0 has no shape yet: lazy modules"),
    ({"layers": [complex_layer]}, "'weight' of layer 0 is torch.complex64: must be a floating-point type"),
    ({"layers": [lambda: 3]}, "factory of layer 0 gave a int: it must give a torch.nn.Module"),
    ({"tied": [[(0, "weight"), (3, "scores.weight")]]}, "Job.tied names 'weight' of layer 0: .* are table.weight"),
]


@pytest.mark.filterwarnings("ignore:Lazy modules")
@pytest.mark.parametrize(("changes", "message"), BAD, ids=[message[:30] for _, message in BAD])
def test_what_cannot_be_placed_is_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        describe_job(small_job(**changes))


def test_a_factory_that_raises_is_the_users_mistake() -> None:
    with pytest.raises(KeyError):
        describe_job(small_job(layers=[fails]))
    with pytest.raises(UserCodeError, match="factory of layer 0 raised KeyError: 'size'"):
        build_layer(small_job(layers=[fails]), Layer(0))


# ------------------------------------------------------------------ the digest


def other_loss(scores: Tensor, target: Tensor) -> Tensor:
    return next_token_loss(scores, target) * 2


class OtherTokens(Tokens):
    pass


def built(value: float) -> list[nn.Module]:
    module = Mixer()
    for parameter in module.parameters():
        parameter.data.fill_(value)
    return [module]


DECIDING = [
    {"seed": 6},
    {"global_batch": 16},
    {"micro_batch": 1},
    {"optimizer": AdamW(lr=2e-2)},
    {"schedule": WarmupCosine(total_steps=5)},
    {"clip_norm": 1.0},
    {"tied": TIED},
    {"parameter_dtype": "bfloat16"},
    {"accumulation": "float32"},
    {"quantum_exponent": -40},
    {"non_finite": "skip-step"},
    {"loss": other_loss},
    {"loss": functools.partial(next_token_loss)},
    {"data": Tokens(63)},
    {"data": OtherTokens()},
    {"layers": [Embedding, Mixer, Head]},
    {"layers": [Embedding, Mixer, nn.Dropout(0.1), Head]},
    {"layers": [Embedding, Mixer, nn.Dropout(0.2), Head]},
    {"layers": built(1.0)},
    {"layers": built(2.0)},
]
NOT_DECIDING = [
    {"recompute": True},
    {"steps": 9},
    {"on_step": lambda result: None},
    {"evaluate": lambda found: None, "evaluate_every": 3},
    {"schedule": Constant()},
]


def test_the_digest_covers_what_decides_the_bits() -> None:
    digests = [describe_job(small_job(**changes)).digest for changes in [{}, *DECIDING]]
    assert len(set(digests)) == len(digests)


@pytest.mark.parametrize("changes", NOT_DECIDING, ids="-".join)
def test_the_digest_leaves_out_the_rest(changes: dict[str, object]) -> None:
    assert describe_job(small_job(**changes)).digest == describe_job(small_job()).digest


def test_the_digest_is_the_same_in_every_process() -> None:
    code = """
from numerics_harness import *
from elaswave.runtime.description import describe_job
print(describe_job(small_job(tied=TIED)).digest)
"""
    assert in_fresh_process(code, PYTHONHASHSEED="7").strip() == describe_job(small_job(tied=TIED)).digest


def test_a_description_counts_steps_and_micro_batches() -> None:
    found = describe_job(small_job(steps=9))
    assert (found.steps, found.micro_batches, found.start_step, found.resume_from) == (9, 4, 0, "")
    assert len(found.layers) == 4
