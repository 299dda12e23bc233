"""Accumulators with ledgers: in both or in neither."""

import pytest
import torch
from torch import Tensor

from elaswave.core.ids import BlockId, MicroBatch
from elaswave.core.shape import Shard
from elaswave.errors import InvariantError
from elaswave.runtime.accumulation import Exact64Accumulation
from elaswave.runtime.contribution import BlockGradient, Contribution, Spans, whole
from elaswave.runtime.ledger import LayerAccumulator, Tag, layer_accumulator

OWN, TIED = BlockId(0), BlockId(3)


def contribution(value: float) -> Contribution:
    own = torch.full((2048,), value)
    return {
        OWN: BlockGradient(2048, Spans([(0, 100), (100, 1948)]), (own[:100], own[100:]), torch.float32),
        TIED: whole(torch.full((1024,), 10 * value)),
    }


def tag(micro_batch: int, *, valid: bool = True) -> Tag:
    return Tag(micro_batch=MicroBatch(micro_batch), valid=valid)


def empty() -> LayerAccumulator:
    return layer_accumulator(Exact64Accumulation(quantum_exponent=-44, micro_batches=8), contribution(0.0))


def sums(accumulator: LayerAccumulator) -> tuple[float, float]:
    own = accumulator.partial(Shard(block=OWN, start=1024, stop=2048))
    tied = accumulator.partial(Shard(block=TIED, start=0, stop=1024))
    assert own.numel() == tied.numel() == 1024
    return float(own.max()), float(tied.min())


def test_a_contribution_is_added_once() -> None:
    accumulator = empty()
    assert accumulator.add_if(tag(2), contribution(1.0))
    assert accumulator.add_if(tag(5), contribution(0.5))
    assert not accumulator.add_if(tag(2), contribution(1.0))
    assert accumulator.coverage == 0b100100
    assert sums(accumulator) == (1.5, 15.0)


def test_what_was_read_stays_as_it_was_when_more_is_added() -> None:
    accumulator = empty()
    accumulator.add_if(tag(0), contribution(1.0))
    shown = accumulator.partial(Shard(block=OWN, start=0, stop=1024))
    accumulator.add_if(tag(1), contribution(1.0))
    assert shown.unique().tolist() == [1.0]
    assert sums(accumulator) == (2.0, 20.0)


def test_an_invalid_tag_changes_nothing() -> None:
    accumulator = empty()
    assert not accumulator.add_if(tag(1, valid=False), contribution(1.0))
    assert accumulator.coverage == 0
    assert sums(accumulator) == (0.0, 0.0)
    assert accumulator.add_if(tag(1), contribution(1.0))


def test_a_revoked_accumulator_keeps_what_it_has_and_takes_no_more() -> None:
    accumulator = empty()
    accumulator.add_if(tag(0), contribution(1.0))
    accumulator.revoke()
    assert not accumulator.add_if(tag(1), contribution(1.0))
    assert accumulator.coverage == 1
    assert sums(accumulator) == (1.0, 10.0)


@pytest.mark.parametrize(
    "wrong", [{OWN: whole(torch.ones(2048))}, {OWN: whole(torch.ones(2048)), TIED: whole(torch.ones(1))}]
)
def test_a_contribution_that_does_not_fit_is_refused_before_anything_is_added(wrong: Contribution) -> None:
    accumulator = empty()
    with pytest.raises(InvariantError, match="elements by block"):
        accumulator.add_if(tag(0), wrong)
    assert accumulator.coverage == 0
    assert sums(accumulator) == (0.0, 0.0)


class FailsOnSecond(Exact64Accumulation):
    """Runs out of memory in the second block of a contribution."""

    def __init__(self) -> None:
        super().__init__(quantum_exponent=-44, micro_batches=8)
        self.calls = 0

    def enter(self, accumulator: Tensor, contribution: BlockGradient, *, first: bool) -> None:
        self.calls += 1
        if self.calls == 4:
            raise MemoryError
        super().enter(accumulator, contribution, first=first)


def test_a_torn_sum_is_never_read() -> None:
    accumulator = layer_accumulator(FailsOnSecond(), contribution(0.0))
    assert accumulator.add_if(tag(0), contribution(1.0))
    with pytest.raises(MemoryError):
        accumulator.add_if(tag(1), contribution(1.0))
    assert accumulator.coverage == 1
    with pytest.raises(InvariantError, match="interrupted"):
        sums(accumulator)
    with pytest.raises(InvariantError, match="interrupted"):
        accumulator.add_if(tag(2), contribution(1.0))


def test_a_layer_without_parameters_has_a_ledger_too() -> None:
    accumulator = layer_accumulator(Exact64Accumulation(quantum_exponent=-44, micro_batches=8), {})
    assert accumulator.add_if(tag(3), {})
    assert accumulator.coverage == 0b1000
