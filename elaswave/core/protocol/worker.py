"""The worker's side of the step and recovery protocol as one pure state machine.

Inputs: `receive`, `adopt`, `forward_done`, `backward_done`, `combined`. Outputs: the list `effects`, to be performed in
order. No method waits, reads a clock or touches a tensor. Rules are cited by their numbers in docs/protocol.md.
"""

from elaswave.core.events import HeldShard, WorkerReport
from elaswave.core.facts import (
    Activation,
    Decided,
    Gradient,
    Have,
    Parameters,
    ParametersRequest,
    Partial,
    Reduced,
    State,
    StateRequest,
)
from elaswave.core.ids import ShardId, Step, WorkerId
from elaswave.core.plan import Plan
from elaswave.core.protocol.adoption import AdoptionProtocol
from elaswave.core.protocol.compute import maker_of
from elaswave.core.protocol.effects import Effect, HostLayers, Payload
from elaswave.core.protocol.state import JobFacts
from elaswave.errors import InvariantError


class StepProtocol(AdoptionProtocol):
    """Protocol state of one worker, from the plan that lets it in to the plan that says "finished"."""

    def __init__(self, me: WorkerId, job: JobFacts, plan: Plan) -> None:
        """`plan` is the first one that this worker sees; `admit` brings in what it starts with."""
        super().__init__(me, job, plan)
        self.effects.append(HostLayers(layers=plan.hosting.get(me, ())))

    def start_fresh(self) -> None:
        """Begin with the plan of epoch 1: copies and hosted parameters are at the start version already."""
        version = int(self.job.start_step)
        for index, group in enumerate(self.plan.groups):
            shard = ShardId(index)
            if self.me in group.everyone:
                self.copies[shard] = version
            if self.me in self.hosts(shard):
                self.parameters[shard] = version

    def start_joining(self) -> None:
        """Begin with a later plan: everything is fetched from others."""
        for index, group in enumerate(self.plan.groups):
            if self.me in group.everyone:
                self.ask_for_state(ShardId(index))
        self.ask_for_parameters()

    def take_effects(self) -> list[Effect]:
        """What is to be done since the last call."""
        effects, self.effects = self.effects, []
        return effects

    # ------------------------------------------------------------------ messages

    def receive(self, source: WorkerId, fact: object, payload: Payload = None) -> None:
        """A fact arrived from `source` (possibly this worker itself)."""
        if isinstance(fact, Activation | Gradient | Partial | Have) and fact.step < self.step:
            self.answer_decided(source)
            return
        match fact:
            case Activation() | Gradient():
                self.receive_edge(fact, payload)
            case Partial():
                self.receive_partial(source, fact, payload)
            case Reduced():
                self.receive_reduced(fact, payload)
            case Have():
                self.receive_have(source, fact)
            case Decided():
                if fact.decision.step >= self.step and not self.refuse(source, fact, payload):
                    self.learn(fact.decision)
            case Parameters():
                self.receive_parameters(source, fact, payload)
            case ParametersRequest():
                self.receive_parameters_request(source, fact)
            case StateRequest():
                self.receive_state_request(source, fact)
            case State():
                self.receive_state(source, fact, payload)
            case _:
                raise InvariantError(f"no rule for a fact of type {type(fact).__name__}")

    def answer_decided(self, source: WorkerId) -> None:
        """Who still works on a step that is decided here gets the decision (rule 4.6)."""
        self.tell_decided((source,))

    def resync(self, peer: WorkerId) -> None:
        """A link with a live peer broke and may have lost frames: tell it again all that it may need from here.

        All of these are facts, so telling them twice changes nothing.
        """
        self.tell_decided((peer,))
        self.tell_have((peer,))
        for key, edge in self.log.items():
            if maker_of(self.plan.route(key.step, key.micro_batch), key) == peer:
                self._send_edge(key, edge)
        self.send_partials_again((peer,))
        self.asked = {shard: asking for shard, asking in self.asked.items() if self.plan.groups[shard].owner != peer}
        for index, group in enumerate(self.plan.groups):
            shard = ShardId(index)
            if peer in group.everyone and group.owner == self.me:
                self.send_reduced(self.step, shard, (peer,))
            if shard in self.copies and group.owner == self.me and peer in self.hosts(shard):
                self.publish(shard, (peer,))
            if self.me in group.everyone and self.copies.get(shard, -1) < self.step:
                self.ask_for_state(shard)
        self.ask_for_parameters()
        self.settle()

    # ------------------------------------------------------------------ reports

    def finished(self) -> bool:
        """All copies and hosted parameters that the plan gives to this worker are at the last version."""
        if self.step < self.job.steps:
            return False
        for index, group in enumerate(self.plan.groups):
            shard = ShardId(index)
            if self.me in group.confirmed and self.copies.get(shard) != self.job.steps:
                return False
            if self.me in self.hosts(shard) and self.parameters.get(shard) != self.job.steps:
                return False
        return True

    def hosted_ready(self) -> bool:
        """Some version of all hosted parameters is here."""
        shards = self.job.shape.shards_of_layer
        return all(s in self.parameters for layer in self.plan.hosting.get(self.me, ()) for s in shards[layer])

    def report(self) -> WorkerReport:
        """What the controller may know; adoptions are reported once."""
        adoptions, self.adoptions = tuple(self.adoptions), []
        held = tuple(
            HeldShard(
                shard=shard, version=version, reduced=tuple(sorted(step for step, s in self.reduced if s == shard))
            )
            for shard, version in sorted(self.copies.items())
        )
        return WorkerReport(
            worker=self.me,
            epoch=self.plan.epoch,
            step=Step(self.step),
            adoptions=adoptions,
            held=held,
            finished=self.finished(),
            hosted_ready=self.hosted_ready(),
        )
