"""Order of samples: permutations, disjoint steps, and what is left out."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from elaswave.core.ids import MicroBatch, Step
from elaswave.core.samples import SampleOrder, hash_samples, permute
from elaswave.errors import ConfigError

keys = st.integers(0, 2**64 - 1)


@given(st.integers(1, 3000), keys)
def test_each_key_names_a_permutation(size: int, key: int) -> None:
    images = permute(np.arange(size), size=size, key=key)
    assert sorted(images.tolist()) == list(range(size))


@given(st.integers(1, 2**62), keys, st.data())
def test_images_stay_in_range_and_do_not_depend_on_their_neighbours(size: int, key: int, data: st.DataObject) -> None:
    positions = np.array(data.draw(st.lists(st.integers(0, size - 1), min_size=1, max_size=5)))
    together = permute(positions, size=size, key=key)
    alone = [int(permute(positions[place : place + 1], size=size, key=key)[0]) for place in range(len(positions))]
    assert together.tolist() == alone
    assert all(0 <= image < size for image in alone)


def test_different_keys_give_different_orders() -> None:
    orders = {tuple(permute(np.arange(50), size=50, key=key).tolist()) for key in range(200)}
    assert len(orders) == 200


def test_every_sample_is_about_as_likely_at_every_place() -> None:
    counts = np.zeros((20, 20))
    for key in range(1000):
        counts[np.arange(20), permute(np.arange(20), size=20, key=key * 7919)] += 1
    # 50 expected per cell, standard deviation 7.
    assert counts.min() > 15
    assert counts.max() < 90


@given(st.integers(0, 2**63 - 1), st.integers(1, 6), st.integers(1, 4), st.integers(0, 200), st.integers(0, 50))
def test_a_pass_visits_each_sample_at_most_once(
    seed: int, micro_batches: int, micro_batch: int, extra: int, pass_number: int
) -> None:
    global_batch = micro_batches * micro_batch
    order = SampleOrder(seed=seed, samples=global_batch + extra, global_batch=global_batch, micro_batch=micro_batch)
    assert order.steps_per_pass == (global_batch + extra) // global_batch
    first = pass_number * order.steps_per_pass
    visited = [
        int(sample)
        for step in range(first, first + order.steps_per_pass)
        for index in range(micro_batches)
        for sample in order.sample_ids(Step(step), MicroBatch(index))
    ]
    assert len(visited) == order.steps_per_pass * global_batch
    assert len(set(visited)) == len(visited)
    assert set(visited) <= set(range(global_batch + extra))


def test_what_one_pass_leaves_out_another_visits() -> None:
    order = SampleOrder(seed=1, samples=10, global_batch=8, micro_batch=4)
    visited = {
        int(sample)
        for step in range(20)
        for index in range(2)
        for sample in order.sample_ids(Step(step), MicroBatch(index))
    }
    assert visited == set(range(10))


def test_too_few_samples_for_one_step_are_refused() -> None:
    with pytest.raises(ConfigError, match="7 samples and global_batch is 8"):
        SampleOrder(seed=0, samples=7, global_batch=8, micro_batch=2)


def test_the_hash_tells_step_micro_batch_ids_and_their_order_apart() -> None:
    ids = np.array([3, 1, 2])
    hashes = {
        hash_samples(Step(0), MicroBatch(0), ids),
        hash_samples(Step(1), MicroBatch(0), ids),
        hash_samples(Step(0), MicroBatch(1), ids),
        hash_samples(Step(0), MicroBatch(0), ids[::-1]),
        hash_samples(Step(0), MicroBatch(0), ids[:2]),
    }
    assert len(hashes) == 5
    assert all(0 <= value < 2**64 for value in hashes)


def test_orders_are_the_same_for_ever() -> None:
    order = SampleOrder(seed=42, samples=1000, global_batch=8, micro_batch=4)
    assert order.sample_ids(Step(0), MicroBatch(0)).tolist() == GOLDEN[0]
    assert order.sample_ids(Step(130), MicroBatch(1)).tolist() == GOLDEN[1]


GOLDEN = ([107, 167, 55, 466], [644, 816, 340, 499])
