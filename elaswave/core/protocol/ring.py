"""Partial sums that are combined on their way to an owner (rule 3.11, docs/adr/0011-reduce-plans.md)."""

from elaswave.core.facts import LossScalars, Partial
from elaswave.core.ids import Coverage, Layer, ShardId, WorkerId
from elaswave.core.protocol.compute import ComputeProtocol
from elaswave.core.protocol.effects import PassOn
from elaswave.core.protocol.state import PartialSum, SumKey
from elaswave.core.reduce_plan import ReducePlan, path_to_owner


class RingProtocol(ComputeProtocol):
    """A worker's part in the rings of the layers that it has hops of."""

    def pass_on(self, layer: Layer, shard: ShardId) -> bool:
        """Send the running sum to the next one on the path as soon as all that goes into it is here.

        False where this worker's sums of the shard go to the owner directly, or where it has none.
        """
        plan, owner = self.plan.reduce_plans.get(layer), self.plan.groups[shard].owner
        if plan is None or plan.kind == "direct" or self.step < plan.first_step or owner in (None, self.me):
            return False
        path = path_to_owner(plan.order, self.contributors(layer), owner, shard)
        if self.me not in path:
            return False
        key = SumKey(self.step, layer, plan.epoch)
        own = self.complete_sums(layer)
        place = path.index(self.me)
        before = self.running_sum(plan, layer, shard, path[place - 1]) if place else PartialSum(Coverage(0), None, None)
        if own and before is not None and (key, shard) not in self.passed_on:
            self.passed_on[(key, shard)] = path[place + 1]
            self._pass_on_to(path[place + 1], key, shard, own, before)
        return True

    def complete_sums(self, layer: Layer) -> list[SumKey]:
        """This worker's accumulators of the layer in the present assignment, or none until all of them are complete."""
        wanted = {SumKey(self.step, *found): mask for found, mask in self.my_sums.items() if found[0] == layer}
        complete = all(not mask & ~self.coverage.get(key, 0) for key, mask in wanted.items())
        return sorted(wanted, key=lambda key: key.epoch) if complete else []

    def running_sum(self, plan: ReducePlan, layer: Layer, shard: ShardId, source: WorkerId) -> PartialSum | None:
        """What `source` has passed on in this step under the same reduce plan; that of another one has other parts."""
        return self.partials.get((self.step, shard), {}).get((source, layer, plan.epoch, True))

    def carries_loss(self, layer: Layer, shard: ShardId) -> bool:
        """Partial sums of this layer and shard have the loss with them."""
        return shard == self.job.shape.loss_shard and layer == self.job.shape.layers - 1

    def _pass_on_to(self, to: WorkerId, key: SumKey, shard: ShardId, own: list[SumKey], before: PartialSum) -> None:
        coverage, loss = int(before.coverage), before.loss or LossScalars()
        for found in own:
            coverage |= self.coverage[found]
            loss = loss + self._loss_of(found)
        fact = Partial(
            step=key.step,
            shard=shard,
            layer=key.layer,
            epoch=key.epoch,
            coverage=Coverage(coverage),
            loss=loss if self.carries_loss(key.layer, shard) else None,
            running=True,
        )
        self.effects.append(
            PassOn(
                to=to,
                fact=fact,
                accumulators=tuple(found.epoch for found in own),
                before=before.coverage,
                payload=before.payload,
            )
        )

    def _loss_of(self, key: SumKey) -> LossScalars:
        return self.losses.get(key, LossScalars())
