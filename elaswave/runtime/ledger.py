"""Accumulators with their ledgers: what is in a sum, and the indivisible act of adding to both."""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from elaswave.core.ids import BlockId, Coverage, MicroBatch
from elaswave.core.shape import Shard
from elaswave.errors import InvariantError
from elaswave.runtime.accumulation import Accumulation
from elaswave.runtime.contribution import Contribution


@dataclass(frozen=True, slots=True, kw_only=True)
class Tag:
    """What travels with a contribution: whose it is, and whether the input that it was made from was good."""

    micro_batch: MicroBatch
    valid: bool = True


class LayerAccumulator:
    """Sum of one layer's contributions at one (step, assignment epoch), flat by block, with its ledger.

    Invariant: bit m of `coverage` is set exactly when the contribution of micro-batch m is in every block's sum.
    """

    def __init__(self, accumulation: Accumulation, elements: Mapping[BlockId, int]) -> None:
        """`elements`: the blocks in which the layer has parameters, with their lengths."""
        self._accumulation = accumulation
        self._elements = dict(elements)
        self._sums: dict[BlockId, Tensor] = {}
        self._coverage = Coverage(0)
        self._revoked = False
        self._torn = False
        self._shown = False  # others may read the sums in place

    @property
    def coverage(self) -> Coverage:
        """The ledger: micro-batches whose contributions are in the sums."""
        return self._coverage

    def revoke(self) -> None:
        """Refuse everything from now on: the assignment was superseded. What is in stays, and can be read."""
        self._revoked = True

    def add_if(self, tag: Tag, contribution: Contribution) -> bool:
        """Add the contribution and enter it in the ledger, or do neither and return False.

        Refused: an invalid tag, a revoked accumulator, a micro-batch that is in the ledger already. Should adding be
        interrupted (out of memory, a signal handler that raises), the sums can no longer be read: InvariantError.
        """
        if not tag.valid or self._revoked or self._coverage >> tag.micro_batch & 1:
            return False
        self._check(contribution)
        self._torn = True
        if self._shown:
            self._sums = {block: self._accumulation.combine([total]) for block, total in self._sums.items()}
            self._shown = False
        first = not self._coverage
        for block, gradient in contribution.items():
            if first:
                self._sums[block] = self._accumulation.empty(gradient.elements)
            self._accumulation.enter(self._sums[block], gradient, first=first)
        self._coverage = Coverage(self._coverage | 1 << tag.micro_batch)
        self._torn = False
        return True

    def partial(self, shard: Shard) -> Tensor:
        """The part of the sums that belongs to `shard`, in place: later additions go to a copy."""
        if self._torn:
            raise InvariantError("an accumulator is read after an addition to it was interrupted")
        self._shown = True
        total = self._sums.get(shard.block)
        return self._accumulation.zeros(shard.elements) if total is None else total[shard.start : shard.stop]

    def _check(self, contribution: Contribution) -> None:
        if self._torn:
            raise InvariantError("an accumulator is written after an addition to it was interrupted")
        if len(contribution) == len(self._elements) and all(
            self._elements.get(block) == gradient.elements for block, gradient in contribution.items()
        ):
            return
        found = {block: gradient.elements for block, gradient in contribution.items()}
        raise InvariantError(f"a contribution has {found} elements by block, its accumulator {self._elements}")


def layer_accumulator(accumulation: Accumulation, contribution: Contribution) -> LayerAccumulator:
    """An empty accumulator for contributions that look like this one."""
    return LayerAccumulator(accumulation, {block: gradient.elements for block, gradient in contribution.items()})
