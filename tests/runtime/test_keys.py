"""Keys of random generators."""

import itertools

import torch
from hypothesis import given
from hypothesis import strategies as st

from elaswave.core.ids import Layer, MicroBatch, Step
from elaswave.core.keys import backward_key, evaluation_key, init_key, layer_key, order_key, sample_key


@given(st.integers(0, 2**63 - 1), st.integers(0, 2**40), st.integers(0, 2**20), st.integers(0, 2**20))
def test_keys_have_64_bits_and_differ_by_every_part(seed: int, step: int, layer: int, micro_batch: int) -> None:
    keys = [
        layer_key(
            seed ^ change[0], Step(step + change[1]), Layer(layer + change[2]), MicroBatch(micro_batch + change[3])
        )
        for change in itertools.product((0, 1), repeat=4)
    ]
    keys.append(layer_key(seed, Step(step), Layer(layer), MicroBatch(micro_batch), tp_rank=1))
    keys.append(backward_key(seed, Step(step), Layer(layer), MicroBatch(micro_batch)))
    assert len(set(keys)) == len(keys)
    assert all(0 <= key < 2**64 for key in keys)


def test_keys_of_different_uses_differ() -> None:
    keys = {init_key(1, Layer(2)), sample_key(1, 2), order_key(1, 2), evaluation_key(1, Step(2))}
    assert len(keys) == 4


def test_keys_are_the_same_for_ever() -> None:
    assert layer_key(1, Step(2), Layer(3), MicroBatch(4)) == GOLDEN


def test_generators_take_every_key_and_the_cpu_uses_its_low_half() -> None:
    draws = []
    for key in (2**64 - 1, 2**32 - 1, 2**64 - 2):
        generator = torch.Generator().manual_seed(key)
        draws.append(torch.rand(4, generator=generator).tolist())
    assert draws[0] == draws[1]
    assert draws[0] != draws[2]


GOLDEN = 14372965508508252948
