"""Micro-batches: which samples, made with which random numbers, and what is wrong with them."""

import random

import numpy as np
import pytest
import torch
from numerics_harness import Tokens, small_job
from torch import Tensor

from elaswave.core.ids import MicroBatch, Step
from elaswave.core.samples import SampleOrder, hash_samples
from elaswave.errors import UserCodeError
from elaswave.job import Dataset
from elaswave.runtime.data import CACHED_MICRO_BATCHES, MicroBatchLoader


class Recorder:
    """Gives its index, and a number from each generator; remembers what it was asked for."""

    def __init__(self) -> None:
        self.asked: list[int] = []

    def __len__(self) -> int:
        return 24

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        self.asked.append(index)
        drawn = [float(torch.rand(())), random.random(), float(np.random.rand())]
        return torch.tensor([index, *drawn], dtype=torch.float64), torch.tensor([index] * 3)


def loader(data: Dataset, **changes: object) -> MicroBatchLoader:
    return MicroBatchLoader(small_job(data=data, **changes))


def test_a_micro_batch_is_the_samples_of_the_order() -> None:
    found = loader(Recorder()).load(Step(1), MicroBatch(2))
    order = SampleOrder(seed=5, samples=24, global_batch=8, micro_batch=2)
    ids = order.sample_ids(Step(1), MicroBatch(2))
    assert found.input[:, 0].tolist() == ids.tolist()
    assert found.target.tolist() == [[index] * 3 for index in ids]
    assert found.tokens == 6
    assert found.samples == hash_samples(Step(1), MicroBatch(2), ids)


def test_a_sample_is_the_same_whenever_it_is_loaded() -> None:
    data = Recorder()
    loads: dict[float, set[tuple[float, ...]]] = {}
    for attempt in range(2):
        torch.manual_seed(attempt)
        random.seed(attempt)
        np.random.seed(attempt)
        fresh = loader(data)
        for step in range(6):
            for micro_batch in range(4)[:: 1 - 2 * attempt]:
                for row in fresh.load(Step(step), MicroBatch(micro_batch)).input.tolist():
                    loads.setdefault(row[0], set()).add(tuple(row[1:]))
    assert len(loads) == 24
    assert all(len(variants) == 1 for variants in loads.values())
    assert len({variant for variants in loads.values() for variant in variants}) == 24


def test_what_is_loaded_twice_is_read_once_and_the_cache_is_bounded() -> None:
    data = Recorder()
    fresh = loader(data)
    first = fresh.load(Step(0), MicroBatch(0))
    assert fresh.load(Step(0), MicroBatch(0)) is first
    assert len(data.asked) == 2
    for step in range(CACHED_MICRO_BATCHES):
        fresh.load(Step(step), MicroBatch(1))
    assert fresh.load(Step(0), MicroBatch(0)) is not first
    assert len(fresh._cache) == CACHED_MICRO_BATCHES


class Wrong(Tokens):
    def __init__(self, item: object, at: int = -1) -> None:
        super().__init__()
        self.item = item
        self.at = at

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        if self.at not in (-1, index):
            return super().__getitem__(index)
        if isinstance(self.item, Exception):
            raise self.item
        return self.item  # type: ignore[return-value]


ODD = SampleOrder(seed=5, samples=64, global_batch=8, micro_batch=2).sample_ids(Step(0), MicroBatch(0)).tolist()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (Wrong(OSError(5, "disk\ngone")), rf"data set item {ODD[0]} raised OSError: \[Errno 5\] disk gone"),
        (Wrong((torch.ones(1),)), f"data set item {ODD[0]} is a tuple: must be a pair"),
        (Wrong(torch.ones(2)), f"data set item {ODD[0]} is a Tensor: must be a pair"),
        (Wrong((1, 2)), f"data set item {ODD[0]} is a tuple: must be a pair"),
        (
            Wrong((torch.zeros(8).long(), torch.zeros(7).long()), ODD[1]),
            rf"data set item {ODD[1]}: target has shape \(7,\) .* item {ODD[0]} has \(8,\)",
        ),
        (Wrong((torch.zeros(8), torch.zeros(8).long()), ODD[1]), rf"item {ODD[1]}: input has .* torch.float32"),
    ],
)
def test_a_bad_sample_is_named(data: Wrong, message: str) -> None:
    with pytest.raises(UserCodeError, match=message) as caught:
        loader(data).load(Step(0), MicroBatch(0))
    assert "\n" not in str(caught.value)
    if isinstance(data.item, Exception):
        assert caught.value.__cause__ is data.item
