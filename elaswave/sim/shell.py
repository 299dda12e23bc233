"""The symbolic shell of one worker: does on symbols what a real one does on tensors, and checks each act.

A contribution is the triple (step, layer, micro-batch), a sum or gradient the sorted tuple of the contributions in it,
a state or parameter the tuple of the gradients applied, an activation or gradient at a cut the words that name it.
"""

from dataclasses import dataclass, field

from elaswave.core.facts import Fact, LossScalars, Parameters, Partial, ShardScalars, State
from elaswave.core.ids import Layer, MicroBatch, ShardId, Step
from elaswave.core.plan import Hop
from elaswave.core.protocol import effects as do
from elaswave.core.protocol.state import EdgeKey, HopKey, JobFacts, SumKey
from elaswave.core.protocol.worker import StepProtocol

Contribution = tuple[int, int, int]
Sum = tuple[Contribution, ...]
Version = tuple[Sum, ...]


class Violation(Exception):
    """A promise of the protocol does not hold in this run."""


@dataclass(frozen=True, slots=True)
class Message:
    """A fact in flight."""

    fact: Fact
    payload: object


def full_gradient(job: JobFacts, step: int, shard: ShardId) -> Sum:
    """What the gradient of a shard must hold: every micro-batch of every layer that it belongs to, once."""
    layers = job.shape.layers_of_shard(shard)
    return tuple(sorted((step, int(layer), m) for layer in layers for m in range(job.micro_batches)))


def norm_of(shard: ShardId) -> int:
    """A stand-in for the norm of a shard, such that sums of norms tell which shards are in them, and how often."""
    return int(16**shard)


def loss_of(micro_batch: MicroBatch) -> int:
    """A stand-in for the loss of a micro-batch, such that sums of losses tell which ones are in them."""
    return int(16**micro_batch)


@dataclass
class WorkerShell:
    """What a worker keeps beside its protocol.

    `broken`: peers whose link broke and that were not told again yet. `unnoticed`: those of them for which the break
    has not been noticed; what is sent to them is lost.
    """

    protocol: StepProtocol
    left: bool = False
    states: dict[ShardId, Version] = field(default_factory=dict)
    parameters: dict[ShardId, Version] = field(default_factory=dict)
    sums: dict[SumKey, Sum] = field(default_factory=dict)
    forwards: frozenset[HopKey] = frozenset()
    broken: frozenset[int] = frozenset()
    unnoticed: frozenset[int] = frozenset()

    def clone(self) -> "WorkerShell":
        """An independent copy."""
        return WorkerShell(
            self.protocol.clone(),
            self.left,
            self.states.copy(),
            self.parameters.copy(),
            self.sums.copy(),
            self.forwards,
            self.broken,
            self.unnoticed,
        )

    def fingerprint(self) -> int:
        """Hash of everything that future behaviour depends on; sums follow from the protocol's coverage."""
        states, parameters = frozenset(self.states.items()), frozenset(self.parameters.items())
        links = (self.broken, self.unnoticed)
        return hash((self.left, self.protocol.fingerprint(), states, parameters, self.forwards, links))

    # ------------------------------------------------------------------ effects

    def perform(self, effect: do.Effect) -> Message | None:
        """Do what the protocol asks for; the message to send, if it is that. Raises Violation."""
        match effect:
            case do.Send():
                return Message(effect.fact, self._payload(effect))
            case do.Combine():
                self._combine(effect)
            case do.PassOn():
                return Message(effect.fact, self._running_sum(effect))
            case do.Apply():
                self._apply(effect)
            case do.InstallParameters():
                self._install(self.parameters, effect.shard, effect.payload, effect.version)
            case do.InstallState():
                self._install(self.states, effect.shard, effect.payload, effect.version)
            case do.InstallOwnParameters():
                self._install(self.parameters, effect.shard, self.states[effect.shard], effect.version)
            case do.DropCopy():
                self.states.pop(effect.shard, None)
            case do.HostLayers():
                hosted = {shard for layer in effect.layers for shard in self._job.shape.shards_of_layer[layer]}
                self.parameters = {shard: found for shard, found in self.parameters.items() if shard in hosted}
            case do.DiscardHop():
                self.forwards -= {HopKey(effect.step, effect.micro_batch, effect.first, effect.last)}
            case do.StepDecided():
                self._decided(effect)
        return None

    @property
    def _job(self) -> JobFacts:
        return self.protocol.job

    def _payload(self, effect: do.Send) -> object:
        fact = effect.fact
        if isinstance(fact, Partial):
            found = self.sums[SumKey(fact.step, fact.layer, fact.epoch)]
            if sum(1 << m for _, _, m in found) != fact.coverage:
                raise Violation(f"w{self.protocol.me} sends {found} as {fact.coverage:#b}")
            return found
        if isinstance(fact, Parameters | State):
            state = self.states[fact.shard]
            if len(state) != fact.version:
                raise Violation(f"w{self.protocol.me} sends version {fact.version} of {fact.shard} at {len(state)}")
            return state
        return effect.payload

    def _running_sum(self, effect: do.PassOn) -> Sum:
        fact = effect.fact
        parts = [self.sums[SumKey(fact.step, fact.layer, epoch)] for epoch in effect.accumulators]
        if isinstance(effect.payload, tuple):
            parts.append(effect.payload)
        found = tuple(sorted(contribution for part in parts for contribution in part))
        if len(set(found)) != len(found) or sum(1 << m for _, _, m in found) != fact.coverage:
            raise Violation(f"w{self.protocol.me} passes {found} on as {fact.coverage:#b}")
        return found

    def _combine(self, effect: do.Combine) -> None:
        gradient = tuple(sorted(found for part in effect.parts if isinstance(part, tuple) for found in part))
        if gradient != full_gradient(self._job, effect.step, effect.shard):
            raise Violation(f"gradient of shard {effect.shard} in step {effect.step} is {gradient}")
        scalars = ShardScalars(norm_squared=norm_of(effect.shard))
        self.protocol.combined(effect.step, effect.shard, scalars, gradient)

    def _apply(self, effect: do.Apply) -> None:
        state = self.states[effect.shard]
        if len(state) != effect.version:
            raise Violation(f"w{self.protocol.me} applies version {effect.version} at {len(state)}")
        if effect.reduced != full_gradient(self._job, effect.version, effect.shard):
            raise Violation(f"w{self.protocol.me} updates shard {effect.shard} with {effect.reduced}")
        if effect.decision.step != effect.version:
            raise Violation(f"w{self.protocol.me} updates with the result of step {effect.decision.step}")
        self.states[effect.shard] = (*state, effect.reduced)

    def _install(self, target: dict[ShardId, Version], shard: ShardId, payload: object, version: int) -> None:
        expected = tuple(full_gradient(self._job, step, shard) for step in range(version))
        if payload != expected:
            raise Violation(f"w{self.protocol.me} takes {payload} as version {version} of shard {shard}")
        target[shard] = expected

    def _decided(self, effect: do.StepDecided) -> None:
        decision = effect.decision
        loss = sum(loss_of(MicroBatch(m)) for m in range(self._job.micro_batches))
        if decision.loss.loss != loss:
            raise Violation(f"the loss of step {decision.step} counts {decision.loss.loss:#x}")
        if decision.norm_squared != sum(norm_of(ShardId(s)) for s in range(len(self._job.shape.shards))):
            raise Violation(f"the norm of step {decision.step} counts {decision.norm_squared:#x}")
        self.sums = {key: found for key, found in self.sums.items() if key.step > decision.step}
        self.forwards = frozenset(key for key in self.forwards if key.step > decision.step)

    # ------------------------------------------------------------------ work

    def ready_hops(self) -> list[tuple[MicroBatch, Hop, bool]]:
        """Hops that could run now; True: backward."""
        protocol = self.protocol
        found: list[tuple[MicroBatch, Hop, bool]] = []
        if protocol.step >= protocol.job.steps:
            return found
        for micro_batch, hop in protocol.my_hops():
            if protocol.can_backward(micro_batch, hop):
                found.append((micro_batch, hop, True))
            elif protocol.can_forward(micro_batch, hop):
                found.append((micro_batch, hop, False))
        return found

    def run_hop(self, micro_batch: MicroBatch, hop: Hop, *, backward: bool) -> None:
        """Run one hop. Raises Violation for wrong parameters or a wrong input."""
        protocol, step = self.protocol, self.protocol.step
        self._check_parameters(hop, step)
        key = HopKey(step, micro_batch, hop.first, hop.last)
        self._check_input(micro_batch, hop, step, backward=backward)
        if not backward:
            self.forwards |= {key}
            protocol.forward_done(micro_batch, hop, ("activation", step, micro_batch, hop.last))
            return
        if key not in self.forwards:
            raise Violation(f"w{protocol.me} runs backward of {key} without its forward")
        self.forwards -= {key}
        loss = LossScalars(loss=loss_of(micro_batch), tokens=1) if hop.last == protocol.job.shape.layers else None
        for layer in range(hop.first, hop.last):
            sum_key = SumKey(step, Layer(layer), hop.epoch)
            self.sums[sum_key] = (*self.sums.get(sum_key, ()), (step, layer, int(micro_batch)))
        protocol.backward_done(micro_batch, hop, ("gradient", step, micro_batch, hop.first), loss)

    def ready_replays(self) -> list[tuple[EdgeKey, Hop]]:
        """Values that the capped log has dropped, that somebody needs, and that can be made again now."""
        replays = self.protocol.replays
        return [(key, hop) for key, hop in replays.items() if self.protocol.layers_ready(hop.first, hop.last)]

    def replay(self, key: EdgeKey, hop: Hop) -> None:
        """Run a hop once more for its output; its contribution is in already."""
        self._check_parameters(hop, key.step)
        self._check_input(key.micro_batch, hop, key.step, backward=False)
        if key.backward:
            self._check_input(key.micro_batch, hop, key.step, backward=True)
        self.protocol.replayed(key, ("gradient" if key.backward else "activation", key.step, key.micro_batch, key.cut))

    def trim_log(self, cap: int) -> None:
        """Evict the oldest values of the boundary log until only `cap` are kept."""
        kept = [key for key, edge in self.protocol.log.items() if not edge.evicted]
        for key in kept[: max(0, len(kept) - cap)]:
            self.protocol.evict(key)

    def _check_parameters(self, hop: Hop, step: Step) -> None:
        for layer in range(hop.first, hop.last):
            for shard in self._job.shape.shards_of_layer[layer]:
                version = len(self.parameters[shard]) if shard in self.parameters else None
                if version != step:
                    raise Violation(f"w{self.protocol.me} computes step {step} of layer {layer} at version {version}")

    def _check_input(self, micro_batch: MicroBatch, hop: Hop, step: Step, *, backward: bool) -> None:
        cut = hop.last if backward else hop.first
        if cut in (0, self._job.shape.layers):
            return
        edge = self.protocol.input_of(micro_batch, cut, backward=backward)
        wanted = ("gradient" if backward else "activation", step, micro_batch, cut)
        if edge is None or edge.payload != wanted:
            raise Violation(f"w{self.protocol.me} runs {hop} of {micro_batch} on {edge}")
