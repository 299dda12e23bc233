"""Everything a worker knows about the protocol; see docs/protocol.md for the lifetime of each item."""

from dataclasses import dataclass
from typing import Self

from elaswave.core.facts import Decision, Fact, LossScalars, NonFinite, ShardScalars
from elaswave.core.ids import Coverage, Epoch, Layer, MicroBatch, ShardId, Step, WorkerId
from elaswave.core.plan import Group, Hop, Plan, Route
from elaswave.core.protocol.effects import Effect, Payload
from elaswave.core.shape import ModelShape


@dataclass(frozen=True, slots=True)
class EdgeKey:
    """An activation (forward) or gradient (backward) at a cut of one micro-batch."""

    step: Step
    micro_batch: MicroBatch
    cut: Layer
    backward: bool


@dataclass(frozen=True, slots=True)
class Edge:
    """The value at an edge. In the log, `hop` is the work that made it; once evicted, the payload is gone."""

    payload: Payload
    non_finite: NonFinite | None = None
    hop: Hop | None = None
    evicted: bool = False


@dataclass(frozen=True, slots=True)
class HopKey:
    """Work on one micro-batch: layers first to last (exclusive)."""

    step: Step
    micro_batch: MicroBatch
    first: Layer
    last: Layer


@dataclass(frozen=True, slots=True)
class SumKey:
    """An accumulator: all hops of one (step, layer, assignment epoch) at one worker (rule 3.1)."""

    step: Step
    layer: Layer
    epoch: Epoch


@dataclass(frozen=True, slots=True)
class PartialSum:
    """A partial sum as received: the micro-batches that are in it, and its bytes."""

    coverage: Coverage
    loss: LossScalars | None
    payload: Payload


SumSource = tuple[WorkerId, Layer, Epoch, bool]
"""Whose a partial sum is: sender, layer, epoch, and whether it is a running sum."""


@dataclass(frozen=True, slots=True)
class ReducedShard:
    """A complete gradient."""

    scalars: ShardScalars
    payload: Payload


@dataclass(frozen=True, slots=True, kw_only=True)
class JobFacts:
    """What never changes during a job."""

    shape: ModelShape
    micro_batches: int
    start_step: Step
    steps: int

    @property
    def full(self) -> Coverage:
        """All micro-batches."""
        return Coverage((1 << self.micro_batches) - 1)


_FLAT = (
    "parameters", "early_parameters", "copies", "inputs", "log", "replays", "forwards", "coverage", "losses",
    "combining", "reduced", "sent_partials", "passed_on", "sent_reduced", "decisions", "asked", "state_requests",
)  # fmt: skip
"""Dictionaries of immutable values."""


class ProtocolState:
    """Mutable state of one worker. All containers hold immutable values, so `clone` copies one level only."""

    def __init__(self, me: WorkerId, job: JobFacts, plan: Plan) -> None:
        self.me = me
        self.job = job
        self.plan = plan
        self.step = job.start_step
        self.adoptions: list[tuple[Epoch, Step]] = [(plan.epoch, self.step)]
        self.parameters: dict[ShardId, int] = {}
        self.early_parameters: dict[ShardId, tuple[int, Payload]] = {}
        self.copies: dict[ShardId, int] = {}
        self.inputs: dict[EdgeKey, Edge] = {}
        self.log: dict[EdgeKey, Edge] = {}
        self.replays: dict[EdgeKey, Hop] = {}
        self.forwards: dict[HopKey, None] = {}
        self.coverage: dict[SumKey, Coverage] = {}
        self.losses: dict[SumKey, LossScalars] = {}
        self.partials: dict[tuple[Step, ShardId], dict[SumSource, PartialSum]] = {}
        self.combining: dict[tuple[Step, ShardId], None] = {}
        self.reduced: dict[tuple[Step, ShardId], ReducedShard] = {}
        self.have: dict[Step, dict[tuple[WorkerId, ShardId], ShardScalars]] = {}
        self.sent_partials: dict[tuple[SumKey, ShardId], tuple[WorkerId, Coverage]] = {}
        self.passed_on: dict[tuple[SumKey, ShardId], WorkerId] = {}
        self.sent_reduced: dict[tuple[Step, ShardId], Group] = {}
        self.decisions: dict[Step, Decision] = {}
        self.asked: dict[ShardId, tuple[Step, Epoch]] = {}
        self.state_requests: dict[tuple[WorkerId, ShardId, Step], None] = {}
        self.held: list[tuple[WorkerId, Fact, Payload]] = []
        self.effects: list[Effect] = []
        self._my_sums: dict[tuple[Layer, Epoch], Coverage] | None = None
        self._contributors: dict[Layer, frozenset[WorkerId]] = {}

    # ------------------------------------------------------------------ views

    @property
    def excluded(self) -> bool:
        """The plan does not count on this worker."""
        return self.me not in self.plan.ids

    def route(self, micro_batch: MicroBatch) -> Route:
        """Hops of a micro-batch in the step under way."""
        return self.plan.route(self.step, micro_batch)

    @property
    def my_sums(self) -> dict[tuple[Layer, Epoch], Coverage]:
        """Per (layer, assignment epoch), the micro-batches that the plan gives to this worker in this step."""
        if self._my_sums is None:
            sums: dict[tuple[Layer, Epoch], int] = {}
            for micro_batch, route in enumerate(self.plan.table(self.step).routes):
                for hop in route:
                    if hop.worker == self.me:
                        for layer in range(hop.first, hop.last):
                            key = (Layer(layer), hop.epoch)
                            sums[key] = sums.get(key, 0) | 1 << micro_batch
            self._my_sums = {key: Coverage(mask) for key, mask in sums.items()}
        return self._my_sums

    def contributors(self, layer: Layer) -> frozenset[WorkerId]:
        """Workers to which the plan gives hops of this layer in this step."""
        found = self._contributors.get(layer)
        if found is None:
            hops = (hop for route in self.plan.table(self.step).routes for hop in route)
            found = frozenset(hop.worker for hop in hops if hop.first <= layer < hop.last)
            self._contributors[layer] = found
        return found

    def hosts(self, shard: ShardId) -> tuple[WorkerId, ...]:
        """Workers that hold parameters of this shard."""
        found = {
            host for layer in self.job.shape.layers_of_shard(shard) for host in self.plan.hosts_of_layer.get(layer, ())
        }
        return tuple(sorted(found))

    def forget_views(self) -> None:
        """The plan or the step changed: recompute what is derived from both."""
        self._my_sums = None
        self._contributors = {}

    def is_needed(self, step: Step, shard: ShardId) -> bool:
        """A reduced gradient is kept until the copy here has applied it, not only until its step is decided."""
        return step >= self.copies.get(shard, self.step - 1)

    # ------------------------------------------------------------------ for exploration

    def clone(self) -> Self:
        """An independent copy."""
        other = object.__new__(type(self))
        for name, value in self.__dict__.items():
            setattr(other, name, value.copy() if isinstance(value, dict | list) else value)
        other.partials = {key: dict(inner) for key, inner in self.partials.items()}
        other.have = {key: dict(inner) for key, inner in self.have.items()}
        return other

    def fingerprint(self) -> int:
        """Hash of everything that future behaviour depends on; payloads must be hashable."""
        items: list[object] = [self.plan.epoch, self.step, tuple(self.adoptions), tuple(self.held), tuple(self.effects)]
        items += [frozenset(getattr(self, name).items()) for name in _FLAT]
        for nested in (self.partials, self.have):
            items.append(frozenset((key, frozenset(inner.items())) for key, inner in nested.items()))
        return hash(tuple(items))


def forget_steps_before(state: ProtocolState, step: Step) -> None:
    """Drop what belongs to steps decided here; reduced gradients stay until the copy here has applied them."""
    state.inputs = {key: edge for key, edge in state.inputs.items() if key.step >= step}
    state.replays = {key: hop for key, hop in state.replays.items() if key.step >= step}
    state.log = {key: edge for key, edge in state.log.items() if key.step >= step}
    state.forwards = {key: None for key in state.forwards if key.step >= step}
    state.coverage = {key: mask for key, mask in state.coverage.items() if key.step >= step}
    state.losses = {key: loss for key, loss in state.losses.items() if key.step >= step}
    state.partials = {key: sums for key, sums in state.partials.items() if key[0] >= step}
    state.combining = {key: None for key in state.combining if key[0] >= step}
    state.sent_reduced = {key: group for key, group in state.sent_reduced.items() if key[0] >= step}
    state.sent_partials = {key: sent for key, sent in state.sent_partials.items() if key[0].step >= step}
    state.passed_on = {key: to for key, to in state.passed_on.items() if key[0].step >= step}
    state.have = {key: have for key, have in state.have.items() if key >= step}
    state.reduced = {key: found for key, found in state.reduced.items() if state.is_needed(key[0], key[1])}
    oldest = min([step - 1, *state.copies.values()])
    state.decisions = {key: decision for key, decision in state.decisions.items() if key >= oldest}
