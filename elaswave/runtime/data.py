"""Micro-batches: the samples of (step, micro-batch) loaded, collated and cached."""

import random
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
from torch import Tensor

from elaswave.core.ids import MicroBatch, Step
from elaswave.core.keys import sample_key
from elaswave.core.samples import SampleOrder, hash_samples
from elaswave.errors import UserCodeError
from elaswave.job import Job
from elaswave.runtime.user_code import UserCode

CACHED_MICRO_BATCHES: Final = 32
"""A worker that hosts the first and the last layer wants a micro-batch twice, a pipeline's depth apart."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MicroBatchData:
    """One micro-batch in host memory.

    input, target: samples stacked along a new first dimension. tokens: number of target elements. samples: 64-bit hash
    of (step, micro-batch, sample ids).
    """

    input: Tensor
    target: Tensor
    tokens: int
    samples: int


class MicroBatchLoader:
    """Loads micro-batches of a job's data set.

    Before a sample is loaded, the generators of torch (CPU), random and numpy are seeded from its id, so that
    augmentation gives the same sample on every worker and in every pass.
    """

    def __init__(self, job: Job) -> None:
        self._data = job.data
        self._seed = job.seed
        self._order = SampleOrder(
            seed=job.seed, samples=len(job.data), global_batch=job.global_batch, micro_batch=job.micro_batch
        )
        self._cache: OrderedDict[tuple[Step, MicroBatch], MicroBatchData] = OrderedDict()

    def load(self, step: Step, micro_batch: MicroBatch) -> MicroBatchData:
        """The micro-batch, from the cache where it was loaded lately. Raises UserCodeError where the data set fails."""
        key = (step, micro_batch)
        found = self._cache.pop(key, None)
        if found is None:
            found = self._read(step, micro_batch)
            if len(self._cache) >= CACHED_MICRO_BATCHES:
                self._cache.popitem(last=False)
        self._cache[key] = found
        return found

    def _read(self, step: Step, micro_batch: MicroBatch) -> MicroBatchData:
        ids = self._order.sample_ids(step, micro_batch)
        samples = [self._sample(int(index)) for index in ids]
        target = _stack("target", [pair[1] for pair in samples], ids.tolist())
        return MicroBatchData(
            input=_stack("input", [pair[0] for pair in samples], ids.tolist()),
            target=target,
            tokens=target.numel(),
            samples=hash_samples(step, micro_batch, ids),
        )

    def _sample(self, index: int) -> tuple[Tensor, Tensor]:
        key = sample_key(self._seed, index)
        torch.default_generator.manual_seed(key)
        random.seed(key)
        np.random.seed(key % 2**32)
        with UserCode(f"data set item {index}"):
            item = self._data[index]
        if not (isinstance(item, tuple | list) and len(item) == 2 and all(isinstance(part, Tensor) for part in item)):  # noqa: PLR2004
            raise UserCodeError(
                f"data set item {index} is a {type(item).__name__}: must be a pair (input, target) of tensors"
            )
        return item[0], item[1]


def _stack(what: str, parts: Sequence[Tensor], ids: Sequence[int]) -> Tensor:
    first = parts[0]
    for index, part in zip(ids, parts, strict=True):
        if part.shape != first.shape or part.dtype != first.dtype:
            raise UserCodeError(
                f"data set item {index}: {what} has shape {tuple(part.shape)} and {part.dtype}, that of item {ids[0]} "
                f"has {tuple(first.shape)} and {first.dtype}: all samples must be alike"
            )
    return torch.stack(list(parts))
