"""The protocol with one rule broken at a time: each class overrides what one rule says, nothing else."""

from collections.abc import Mapping
from dataclasses import replace

from elaswave.core.facts import (
    Activation,
    Decision,
    Gradient,
    Have,
    LossScalars,
    Parameters,
    Partial,
    Reduced,
    ShardScalars,
    StateRequest,
)
from elaswave.core.ids import Layer, MicroBatch, ShardId, Step, WorkerId
from elaswave.core.plan import Group, Hop, Plan, Route
from elaswave.core.protocol.compute import maker_of
from elaswave.core.protocol.effects import Apply, DiscardHop, InstallParameters, Payload, Send
from elaswave.core.protocol.state import EdgeKey, JobFacts, PartialSum, SumKey, SumSource
from elaswave.core.protocol.worker import StepProtocol
from elaswave.core.reduce_plan import ReducePlan
from elaswave.sim.world import World

SumsOfShard = Mapping[SumSource, PartialSum]

# ---------------------------------------------------------------------- 3: compute and repair


class OneLedgerPerWorker(StepProtocol):
    """3.1: what any old sum has is not made again for a new one."""

    def contributed(self, micro_batch: MicroBatch, hop: Hop) -> bool:
        return any(
            mask >> micro_batch & 1
            for key, mask in self.coverage.items()
            if (key.step, key.layer) == (self.step, hop.first)
        )


class AnySumsWillDo(StepProtocol):
    """3.3: sums are combined as soon as everything is in one of them."""

    def find_cover(self, sums: SumsOfShard) -> list[PartialSum] | None:
        union = 0
        for found in sums.values():
            union |= found.coverage
        return list(sums.values()) if union == self.job.full else None


class EarlyEdgesAreDropped(StepProtocol):
    """3.4: an activation or gradient that is not mine in my view is dropped."""

    def receive_edge(self, fact: Activation | Gradient, payload: Payload) -> None:
        key = EdgeKey(fact.step, fact.micro_batch, fact.cut, isinstance(fact, Gradient))
        if maker_of(self.plan.route(fact.step, fact.micro_batch), key) == self.me:
            super().receive_edge(fact, payload)


class EarlySumsAreDropped(StepProtocol):
    """3.4: a partial sum of a shard that is not mine in my view is dropped."""

    def receive_partial(self, source: WorkerId, fact: Partial, payload: Payload) -> None:
        if self.plan.groups[fact.shard].owner == self.me:
            super().receive_partial(source, fact, payload)


class EarlyReducedAreDropped(StepProtocol):
    """3.4: a reduced gradient of a shard that I hold no copy of in my view is dropped."""

    def receive_reduced(self, fact: Reduced, payload: Payload) -> None:
        if self.me in self.plan.groups[fact.shard].everyone:
            super().receive_reduced(fact, payload)


class LogsAreNotSentAgain(StepProtocol):
    """3.6: makers of changed hops are sent nothing that was made before."""

    def resend_edges(self, old: Route, new: Route, micro_batch: MicroBatch) -> None:
        pass


class EvictedIsGone(StepProtocol):
    """3.6: what the capped log has dropped is not made again."""

    def evict(self, key: EdgeKey) -> None:
        self.log.pop(key, None)


class SumsAreSentOnce(StepProtocol):
    """3.7: a new owner is not sent the sums that the old one had."""

    def send_partials(self, key: SumKey) -> None:
        if not any(sent_key == key for sent_key, _ in self.sent_partials):
            super().send_partials(key)


class AnyVersionWillDo(StepProtocol):
    """3.8: a layer runs with whatever parameters are here."""

    def layers_ready(self, first: Layer, last: Layer) -> bool:
        shards = self.job.shape.shards_of_layer
        return all(shard in self.parameters for layer in range(first, last) for shard in shards[layer])


class FactsAreOfMyStep(StepProtocol):
    """3.8: facts are taken for the step under way here, whatever their own step."""

    def receive(self, source: WorkerId, fact: object, payload: Payload = None) -> None:
        if isinstance(fact, Activation | Gradient | Partial | Have) and self.step < self.job.steps:
            fact = replace(fact, step=self.step)
        super().receive(source, fact, payload)


class ParametersWithoutDecision(StepProtocol):
    """3.9: parameters are overwritten at once, not when the step before them is decided here."""

    def receive_parameters(self, source: WorkerId, fact: Parameters, payload: Payload) -> None:
        if self.me in self.hosts(fact.shard) and fact.version > self.parameters.get(fact.shard, -1):
            self.parameters[fact.shard] = fact.version
            self.effects.append(InstallParameters(shard=fact.shard, version=fact.version, payload=payload))


class AdoptionStartsOver(StepProtocol):
    """3.10: a plan discards all forward passes, not only those of hops that it takes away."""

    def adopt(self, plan: Plan) -> None:
        for key in list(self.forwards):
            del self.forwards[key]
            discard = DiscardHop(step=key.step, micro_batch=key.micro_batch, first=key.first, last=key.last)
            self.effects.append(discard)
        super().adopt(plan)


# ---------------------------------------------------------------------- 3.11: rings


class OldRunningSumsAreContinued(StepProtocol):
    """3.11: a running sum of an older reduce plan is added to."""

    def running_sum(self, plan: ReducePlan, layer: Layer, shard: ShardId, source: WorkerId) -> PartialSum | None:
        sums = self.partials.get((self.step, shard), {})
        old = [found for key, found in sums.items() if (*key[:2], key[3]) == (source, layer, True)]
        return old[0] if old else None


class OldSumsArePassedOn(StepProtocol):
    """3.11: sums of former assignments are passed on with those of the present one."""

    def complete_sums(self, layer: Layer) -> list[SumKey]:
        complete = super().complete_sums(layer)
        old = [key for key in self.coverage if (key.step, key.layer) == (self.step, layer)]
        return sorted(old, key=lambda key: key.epoch) if complete else []


class IncompleteSumsArePassedOn(StepProtocol):
    """3.11: a running sum goes on with what is here of one's own."""

    def complete_sums(self, layer: Layer) -> list[SumKey]:
        return [key for key in self.coverage if (key.step, key.layer) == (self.step, layer)]


class RingsGoOnceAStep(StepProtocol):
    """3.11: what was passed on in a step is not passed on under a newer reduce plan."""

    def pass_on(self, layer: Layer, shard: ShardId) -> bool:
        done = any((key.step, key.layer, of) == (self.step, layer, shard) for key, of in self.passed_on)
        return done or super().pass_on(layer, shard)


class RunningSumsAreSentOnce(StepProtocol):
    """8.1: after a broken link, running sums are not passed on again."""

    def send_partials_again(self, receivers: tuple[WorkerId, ...]) -> None:
        passed_on = self.passed_on
        super().send_partials_again(receivers)
        self.passed_on = passed_on


# ---------------------------------------------------------------------- 4: reduce, decide, update, publish


class OnlyComputedIsForwarded(StepProtocol):
    """4.1: an owner passes on what it computed, not what it was sent."""

    def __init__(self, me: WorkerId, job: JobFacts, plan: Plan) -> None:
        super().__init__(me, job, plan)
        self.computed: dict[tuple[Step, ShardId], None] = {}

    def combined(self, step: Step, shard: ShardId, scalars: ShardScalars, payload: Payload) -> None:
        self.computed[step, shard] = None
        super().combined(step, shard, scalars, payload)

    def forward_reduced(self, shard: ShardId) -> None:
        if (self.step, shard) in self.computed:
            super().forward_reduced(shard)


class ReducedIsNotSentAgain(StepProtocol):
    """4.2: holders of a reduced gradient do not send it to a changed group."""

    def reforward(self, shard: ShardId, group: Group) -> None:
        pass


class AnyVersionCounts(StepProtocol):
    """4.3: "have" is said with the reduced gradient, at whatever version."""

    def counts_as_held(self, version: int) -> bool:
        return True


class OwnersDecide(StepProtocol):
    """4.4: a decision does not wait for the replicas."""

    def needed(self, shard: ShardId) -> tuple[WorkerId, ...]:
        owner = self.plan.groups[shard].owner
        return () if owner is None else (owner,)


class LossOfTheWorker(StepProtocol):
    """4.5: a worker's loss counts all that it ever ran in the step, whichever sum it is in."""

    def _loss_of(self, key: SumKey) -> LossScalars:
        total = LossScalars()
        for found in self.losses.values():
            total += found
        return total


class NoAnswerToLatecomers(StepProtocol):
    """4.6: a fact of a decided step is not answered."""

    def answer_decided(self, source: WorkerId) -> None:
        pass


class LeapsAreNotTold(StepProtocol):
    """4.7: who learns a decision without having said "have" does not tell others."""

    def _pass_on(self, decision: Decision, voted: bool, lacking: set[WorkerId]) -> None:
        if voted:
            super()._pass_on(decision, voted, lacking)


class DecisionsAreNotPassedOn(StepProtocol):
    """4.7: who decides does not tell the copies whose "have" it lacks."""

    def _pass_on(self, decision: Decision, voted: bool, lacking: set[WorkerId]) -> None:
        if not voted:
            super()._pass_on(decision, voted, lacking)


class GapsAreSkipped(StepProtocol):
    """4.8: a copy applies the newest reduced gradient that it has."""

    def apply(self, shard: ShardId) -> None:
        version = self.copies[shard]
        for step in range(version, self.step):
            found = self.reduced.get((Step(step), shard))
            decision = self.decisions.get(Step(step))
            if found is not None and decision is not None:
                self.effects.append(Apply(shard=shard, version=version, reduced=found.payload, decision=decision))
                self.copies[shard] = version = version + 1
        super().apply(shard)


class GapsAreNotFilled(StepProtocol):
    """4.8: a copy that lacks a gradient of a decided step does not ask for the state."""

    def ask_for_state(self, shard: ShardId) -> None:
        if shard not in self.copies:
            super().ask_for_state(shard)


class OwnersAnswerLater(StepProtocol):
    """4.8: a request for a state waits until the owner is at the version of the one who asks."""

    def receive_state_request(self, source: WorkerId, fact: StateRequest) -> None:
        if self.copies.get(fact.shard, -1) >= fact.step:
            super().receive_state_request(source, fact)
        else:
            self.state_requests[(source, fact.shard, Step(fact.step))] = None


class DecidedIsDropped(StepProtocol):
    """4.8: a reduced gradient goes when its step is decided, applied or not."""

    def is_needed(self, step: Step, shard: ShardId) -> bool:
        return step >= self.step


class NewOwnersKeepQuiet(StepProtocol):
    """4.9: a new owner does not publish what it has."""

    def publish_as_new_owner(self, shard: ShardId) -> None:
        pass


class NewHostsGetNothing(StepProtocol):
    """4.9: an owner does not publish to hosts that a plan adds."""

    def publish_to_new_hosts(self, shard: ShardId, old: Plan) -> None:
        pass


class HostsNeverAsk(StepProtocol):
    """4.12: a host that lacks parameters does not ask for them."""

    def ask_for_parameters(self) -> None:
        pass


class LogsGoEarly(StepProtocol):
    """4.10: the log of a micro-batch goes when its gradient has left, not when the step is decided."""

    def backward_done(
        self, micro_batch: MicroBatch, hop: Hop, input_gradient: Payload, loss: LossScalars | None = None
    ) -> None:
        super().backward_done(micro_batch, hop, input_gradient, loss)
        self.log = {key: edge for key, edge in self.log.items() if key.micro_batch != micro_batch}


# ---------------------------------------------------------------------- 5: failure and suspicion


class CopiesAreDroppedAlways(StepProtocol):
    """5.3: a copy is dropped under a plan without owner, too."""

    def may_drop(self, group: Group) -> bool:
        return True


class SuspectsDecide(StepProtocol):
    """5.5: decisions of excluded workers are taken."""

    def refuse(self, source: WorkerId, fact: object, payload: Payload) -> bool:
        return False


class RefusedIsForgotten(StepProtocol):
    """5.5: what is refused from an excluded worker is not looked at again."""

    def look_again_at_held(self) -> None:
        self.held = []


class NewcomersAreNotTold(StepProtocol):
    """5.6: who is let in again is not told what is decided and held."""

    def tell_newcomers(self, old: Plan, plan: Plan) -> None:
        pass


class NewcomersGetNoSums(StepProtocol):
    """5.6: sums that a suspect was sent before are not sent again when it is let in."""

    def tell_newcomers(self, old: Plan, plan: Plan) -> None:
        sent = self.sent_partials.copy()
        super().tell_newcomers(old, plan)
        self.sent_partials = sent


# ---------------------------------------------------------------------- 6: change of copies


class CopiesAskOnce(StepProtocol):
    """6.1: a copy asks its first owner only."""

    def ask_for_state(self, shard: ShardId) -> None:
        if shard not in self.asked:
            super().ask_for_state(shard)


class GatesAreNotTold(StepProtocol):
    """6.4: the group does not tell a copy that begins to gate what is decided."""

    def tell_gates(self, gates: tuple[WorkerId, ...]) -> None:
        pass


class GatesDoNotTell(StepProtocol):
    """6.4: a copy that begins to gate does not tell the others what is decided."""

    def tell_as_gate(self, others: tuple[WorkerId, ...]) -> None:
        pass


# ---------------------------------------------------------------------- 8: links


class BrokenLinksAreIgnored(StepProtocol):
    """8.1: what a broken link has lost is not told again."""

    def resync(self, peer: WorkerId) -> None:
        pass


class OnlyOldCopiesAskAgain(StepProtocol):
    """8.1: after a broken link, a copy that never arrived is not asked for again."""

    def resync(self, peer: WorkerId) -> None:
        asked = {shard: asking for shard, asking in self.asked.items() if shard not in self.copies}
        super().resync(peer)
        self.effects = [
            effect
            for effect in self.effects
            if not (isinstance(effect, Send) and isinstance(effect.fact, StateRequest) and effect.fact.shard in asked)
        ]


# ---------------------------------------------------------------------- worlds


class LeavingByOwnView(World):
    """4.11: a worker leaves when it is at the last step, not by plan."""

    def deliver(self, source: int, target: int) -> None:
        super().deliver(source, target)
        self._leave(target)

    def run_hop(self, index: int, place: int) -> None:
        super().run_hop(index, place)
        self._leave(index)

    def _leave(self, index: int) -> None:
        if index in self.workers and self.workers[index].protocol.finished():
            self.touch(index).left = True
