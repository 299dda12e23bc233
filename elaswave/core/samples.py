"""Which samples make up which micro-batch: a pure function of (seed, step, micro-batch), in constant memory."""

import hashlib
import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from elaswave.core.ids import MicroBatch, Step
from elaswave.core.keys import order_key
from elaswave.errors import ConfigError

_ROUNDS = 6
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)
_ROUND_STEP = 0x9E3779B97F4A7C15
_MAX_SAMPLES = 2**62


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleOrder:
    """The order in which the `samples` samples of a data set are visited.

    A pass over the data is samples // global_batch steps and visits each sample at most once, in an order of its own.
    The samples % global_batch samples that do not fill a step are left out of that pass; they are other ones in each
    pass. Raises ConfigError where one step needs more samples than there are.
    """

    seed: int
    samples: int
    global_batch: int
    micro_batch: int

    def __post_init__(self) -> None:
        if not self.global_batch <= self.samples <= _MAX_SAMPLES:
            raise ConfigError(
                f"the data set has {self.samples} samples and global_batch is {self.global_batch}: "
                f"one step needs at least as many samples, so give more data or a smaller global_batch"
            )

    @property
    def steps_per_pass(self) -> int:
        """Steps in one pass over the data."""
        return self.samples // self.global_batch

    def sample_ids(self, step: Step, micro_batch: MicroBatch) -> NDArray[np.int64]:
        """Ids of the samples of one micro-batch, in order; shape (micro_batch,)."""
        pass_number, step_in_pass = divmod(step, self.steps_per_pass)
        first = step_in_pass * self.global_batch + micro_batch * self.micro_batch
        positions = np.arange(first, first + self.micro_batch, dtype=np.int64)
        return permute(positions, size=self.samples, key=order_key(self.seed, pass_number))


def permute(positions: NDArray[np.int64], *, size: int, key: int) -> NDArray[np.int64]:
    """Images of `positions` (0 to size - 1) under the permutation of range(size) that `key` names.

    A Feistel network on pairs modulo a, with a the least integer whose square is at least `size`. What falls outside
    the range is sent through the network again: since it is a bijection, that walk ends inside the range, and as a^2
    is at most size + 2 * sqrt(size), it is rarely needed.
    """
    root = max(1, math.isqrt(size - 1) + 1)
    images = _feistel(positions.astype(np.uint64), root, key)
    outside = np.flatnonzero(images >= size)
    while outside.size:
        images[outside] = _feistel(images[outside], root, key)
        outside = outside[images[outside] >= size]
    return images.astype(np.int64)


def _feistel(values: NDArray[np.uint64], root: int, key: int) -> NDArray[np.uint64]:
    base = np.uint64(root)
    left, right = values // base, values % base
    for turn in range(1, _ROUNDS + 1):
        round_key = np.uint64((key + turn * _ROUND_STEP) % 2**64)
        left, right = right, (left + _mix(right, round_key) % base) % base
    return left * base + right


def _mix(values: NDArray[np.uint64], key: np.uint64) -> NDArray[np.uint64]:
    """SplitMix64's finaliser; unsigned array arithmetic wraps around."""
    mixed = values ^ key
    mixed = (mixed ^ (mixed >> np.uint64(30))) * _MIX_1
    mixed = (mixed ^ (mixed >> np.uint64(27))) * _MIX_2
    return mixed ^ (mixed >> np.uint64(31))


def hash_samples(step: Step, micro_batch: MicroBatch, ids: NDArray[np.int64]) -> int:
    """64-bit hash of (step, micro-batch, sample ids); their sum modulo 2^64 stands for all samples of a step."""
    place = np.array([step, micro_batch], dtype="<i8").tobytes()
    digest = hashlib.blake2b(place + ids.astype("<i8").tobytes(), digest_size=8, person=b"samples")
    return int.from_bytes(digest.digest(), "little")
