"""Copies of optimizer state and published parameters: apply, ask, publish, learn decisions (rules 4.5 to 4.10)."""

from elaswave.core.facts import Decided, Decision, Fact, Parameters, ParametersRequest, State, StateRequest
from elaswave.core.ids import ShardId, Step, WorkerId
from elaswave.core.protocol.effects import (
    Apply,
    InstallOwnParameters,
    InstallParameters,
    InstallState,
    Payload,
    Send,
    StepDecided,
)
from elaswave.core.protocol.reduction import ReductionProtocol
from elaswave.core.protocol.state import SumKey, forget_steps_before


class CopyProtocol(ReductionProtocol):
    """What a decision leads to."""

    # ------------------------------------------------------------------ decisions

    def learn(self, decision: Decision) -> None:
        """A step is decided, found here or heard of; everything before it is decided too."""
        if decision.step < self.step:
            return
        have = self.have.get(decision.step, {})
        groups = self.plan.groups
        mine = [ShardId(s) for s, group in enumerate(groups) if self.me in group.gating]
        voted = all((self.me, shard) in have for shard in mine)
        lacking = {w for s, group in enumerate(groups) for w in group.gating if (w, ShardId(s)) not in have} - {self.me}
        self.step = Step(decision.step + 1)
        self.decisions[decision.step] = decision
        self.forget_views()
        self.effects.append(StepDecided(decision=decision))
        if not self.excluded:
            self._pass_on(decision, voted, lacking)
        for shard in list(self.copies):
            self.apply(shard)
        forget_steps_before(self, self.step)
        for index, group in enumerate(groups):
            if group.owner == self.me and self.copies.get(ShardId(index)) == self.step:
                self.publish(ShardId(index), self._hosts_without_copy(ShardId(index)))
        self.settle()

    def _pass_on(self, decision: Decision, voted: bool, lacking: set[WorkerId]) -> None:
        """Who did not count the decision tells all if others may wait for its "have" (rule 4.7)."""
        to = lacking if voted else self.plan.ids - {self.me}
        self.effects += [Send(to=worker, fact=Decided(decision=decision)) for worker in sorted(to)]

    def settle(self) -> None:
        """Do everything that the step under way, the plan and the facts here allow."""
        for layer, epoch in list(self.my_sums):
            self.send_partials(SumKey(self.step, layer, epoch))
        for shard in list(self.copies):
            self.try_combine(shard)
            self.forward_reduced(shard)
        self.say_have()
        self.try_decide()

    # ------------------------------------------------------------------ copies

    def apply(self, shard: ShardId) -> None:
        """Bring the local copy to the version of the step, gradient by gradient; ask the owner where one is missing."""
        while self.copies[shard] < self.step:
            version = self.copies[shard]
            found = self.reduced.get((Step(version), shard))
            decision = self.decisions.get(Step(version))
            if found is None or decision is None:
                self.ask_for_state(shard)
                return
            self.effects.append(Apply(shard=shard, version=version, reduced=found.payload, decision=decision))
            self.copies[shard] = version + 1
            del self.reduced[(Step(version), shard)]
        self._copy_changed(shard)

    def _copy_changed(self, shard: ShardId) -> None:
        version = self.copies[shard]
        if self.me in self.hosts(shard) and self.parameters.get(shard, -1) < version:
            self.parameters[shard] = version
            self.effects.append(InstallOwnParameters(shard=shard, version=version))
        self.answer_state_requests(shard)

    def catch_up_copy(self, shard: ShardId) -> None:
        """A gradient or a decision that a lagging copy lacked may be here now."""
        if shard in self.copies and self.copies[shard] < self.step:
            self.apply(shard)
            self._publish_late(shard)

    def _publish_late(self, shard: ShardId) -> None:
        if self.plan.groups[shard].owner == self.me and self.copies.get(shard) == self.step:
            self.publish(shard, self.hosts(shard))

    def ask_for_state(self, shard: ShardId) -> None:
        """Ask the owner for the whole state, once per (step, epoch); it is fetched, never pushed (rules 4.8, 6.1)."""
        group = self.plan.groups[shard]
        asking = (self.step, self.plan.epoch)
        if (
            group.owner is None
            or group.owner == self.me
            or self.me not in group.everyone
            or self.asked.get(shard) == asking
        ):
            return
        self.asked[shard] = asking
        self.effects.append(Send(to=group.owner, fact=StateRequest(shard=shard, step=self.step)))

    def receive_state_request(self, source: WorkerId, fact: StateRequest) -> None:
        """Answer at once at the version here, with the reduced gradients held; again when the version is newer."""
        version = self.copies.get(fact.shard)
        if version is not None:
            self._send_state(source, fact.shard)
            for step, shard in sorted(self.reduced):
                if shard == fact.shard:
                    self.send_reduced(step, shard, (source,))
        if version is None or version < fact.step:
            self.state_requests[(source, fact.shard, Step(fact.step))] = None

    def answer_state_requests(self, shard: ShardId) -> None:
        """Send the state to those who asked for a version that was not here yet."""
        for request in [request for request in self.state_requests if request[1] == shard]:
            if self.copies[shard] >= request[2]:
                del self.state_requests[request]
                self._send_state(request[0], shard)

    def _send_state(self, to: WorkerId, shard: ShardId) -> None:
        version = self.copies[shard]
        decision = self.decisions.get(Step(version - 1))
        self.effects.append(Send(to=to, fact=State(shard=shard, version=version, decision=decision)))

    def receive_state(self, source: WorkerId, fact: State, payload: Payload) -> None:
        """Take it as the local copy where the plan wants one and it is newer than what is here."""
        if fact.version > self.step and self.refuse(source, fact, payload):
            return
        if self.me not in self.plan.groups[fact.shard].everyone:
            return
        if fact.version > self.copies.get(fact.shard, -1):
            self.copies[fact.shard] = fact.version
            self.effects.append(InstallState(shard=fact.shard, version=fact.version, payload=payload))
            self._copy_changed(fact.shard)
        if fact.version > self.step and fact.decision is not None:
            self.learn(fact.decision)
        else:
            self.apply(fact.shard)
            self._publish_late(fact.shard)
            self.settle()
        forget_steps_before(self, self.step)

    # ------------------------------------------------------------------ published parameters

    def publish(self, shard: ShardId, to: tuple[WorkerId, ...]) -> None:
        """Send the parameters at the version of the local copy, with the decision that made it."""
        version = self.copies[shard]
        fact = Parameters(shard=shard, version=version, decision=self.decisions.get(Step(version - 1)))
        self.effects += [Send(to=host, fact=fact) for host in to if host != self.me]

    def _hosts_without_copy(self, shard: ShardId) -> tuple[WorkerId, ...]:
        """Hosts that do not make this version themselves: confirmed copies apply the same gradient."""
        confirmed = self.plan.groups[shard].confirmed
        return tuple(host for host in self.hosts(shard) if host not in confirmed)

    def receive_parameters(self, source: WorkerId, fact: Parameters, payload: Payload) -> None:
        """A newer version means that the step before it is decided: only then is it overwritten (rule 3.9)."""
        if fact.version > self.step and self.refuse(source, fact, payload):
            return
        newer = fact.version > max(self.parameters.get(fact.shard, -1), self.early_parameters.get(fact.shard, (-1,))[0])
        decision = fact.decision
        if fact.version > self.step and decision is not None:
            self.learn(decision)
        if not newer or fact.version <= self.parameters.get(fact.shard, -1):
            return
        if self.me in self.hosts(fact.shard):
            self.parameters[fact.shard] = fact.version
            self.effects.append(InstallParameters(shard=fact.shard, version=fact.version, payload=payload))
        else:
            self.early_parameters[fact.shard] = (fact.version, payload)

    def ask_for_parameters(self) -> None:
        """Ask owners for hosted parameters that are not here at all: they may have come and gone under older plans."""
        for layer in self.plan.hosting.get(self.me, ()):
            for shard in self.job.shape.shards_of_layer[layer]:
                owner = self.plan.groups[shard].owner
                if shard not in self.parameters and owner is not None and owner != self.me:
                    self.effects.append(Send(to=owner, fact=ParametersRequest(shard=shard)))

    def receive_parameters_request(self, source: WorkerId, fact: ParametersRequest) -> None:
        """Answer with the version here; who becomes owner later publishes anyway."""
        if fact.shard in self.copies:
            self.publish(fact.shard, (source,))

    # ------------------------------------------------------------------ suspects

    def refuse(self, source: WorkerId, fact: Fact, payload: Payload) -> bool:
        """Hold a decision of a worker that the plan does not count on until the next plan (rule 5.5)."""
        if source in self.plan.ids or source == self.me:
            return False
        self.held.append((source, fact, payload))
        return True
