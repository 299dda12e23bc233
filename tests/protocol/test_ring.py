"""Rings: what the walks of the ring scenes really do, so that keeping all promises in them means something."""

from collections import Counter

import pytest

from elaswave.core.ids import ShardId, WorkerId
from elaswave.core.plan import Plan
from elaswave.core.protocol.state import PartialSum, SumKey
from elaswave.core.protocol.worker import StepProtocol
from elaswave.sim.explore import search, walk
from elaswave.sim.scenes import EXHAUSTIVE, WALKS
from elaswave.sim.shell import Violation


def test_rings_are_used_broken_and_begun_anew() -> None:
    seen: Counter[str] = Counter()

    class Watched(StepProtocol):
        def _pass_on_to(self, to: WorkerId, key: SumKey, shard: ShardId, own: list[SumKey], before: PartialSum) -> None:
            seen["passed on"] += 1
            seen["added to what came"] += bool(before.coverage)
            seen["own sums of several assignments"] += len(own) > 1
            seen["in a later ring"] += key.epoch > 1
            super()._pass_on_to(to, key, shard, own, before)

        def adopt(self, plan: Plan) -> None:
            before = set(self.passed_on)
            super().adopt(plan)
            seen["begun anew within a step"] += bool(self.passed_on.keys() - before)

    for name in WALKS:
        if name.startswith("ring"):
            for seed in range(30):
                walk(WALKS[name], seed, protocol=Watched)
    for what in (
        "added to what came",
        "own sums of several assignments",
        "in a later ring",
        "begun anew within a step",
    ):
        assert seen[what] > 10, seen


@pytest.mark.parametrize("name", ["ring of three", "ring, crash"])
def test_every_state_is_good_only_if_sums_are_passed_on_complete(name: str) -> None:
    class Hasty(StepProtocol):
        def complete_sums(self, layer: int) -> list[SumKey]:
            return [key for key in self.coverage if (key.step, key.layer) == (self.step, layer)]

        def running_sum(self, *_: object) -> PartialSum | None:
            return None

    with pytest.raises(Violation):
        search(EXHAUSTIVE[name], limit=20_000, protocol=Hasty)
