"""An explicit-state world around the project's own protocol and planner: symbolic gradients, FIFO links, crashes.

A gradient is the sorted tuple of the (layer, micro-batch) pairs that are in it, a state the tuple of gradients applied.
Links are FIFO per pair and unordered between pairs; what a dead end has in flight is lost. A worker adopts plans one by
one at any time. Every violation of a promise raises Violation.
"""

from dataclasses import dataclass, field, replace
from typing import Self

from elaswave.core.events import WorkerReport
from elaswave.core.facts import Fact, LossScalars, Parameters, Partial, ShardScalars, State
from elaswave.core.ids import Epoch, Layer, MicroBatch, NodeId, ShardId, Step, WorkerId
from elaswave.core.layout import Stage
from elaswave.core.plan import Group, Hop, Member, Plan, RouteTable
from elaswave.core.planner.context import MemberReport, PlanningContext
from elaswave.core.protocol import effects as do
from elaswave.core.protocol.state import JobFacts, SumKey
from elaswave.core.protocol.worker import StepProtocol
from elaswave.core.routes import balanced_routes
from elaswave.core.shape import CHUNK_ELEMENTS, Block, ModelShape, Shard

Value = tuple[tuple[int, int], ...]


class Violation(Exception):
    """A promise of the protocol does not hold in this run."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Scene:
    """Start of a run. `hosts` per layer (each layer is a stage); `copies` per shard: (layers, owner, replicas).

    Budgets bound what the adversary may do: crashes, suspicions of live workers, planned swaps of owners.
    """

    workers: int
    hosts: tuple[tuple[int, ...], ...]
    copies: tuple[tuple[tuple[int, ...], int, tuple[int, ...]], ...]
    micro_batches: int = 2
    steps: int = 1
    crashes: int = 1
    suspicions: int = 0
    swaps: int = 0
    replicas: int = 1
    restore: bool = True
    stage_ends: tuple[int, ...] | None = None

    def shape(self) -> ModelShape:
        """One block per distinct set of layers, divided into as many shards as `copies` names for it."""
        layer_sets = list(dict.fromkeys(layers for layers, _, _ in self.copies))
        counts = {layers: sum(found == layers for found, _, _ in self.copies) for layers in layer_sets}
        blocks = tuple(
            Block(layers=tuple(Layer(x) for x in layers), elements=counts[layers] * CHUNK_ELEMENTS)
            for layers in layer_sets
        )
        seen = dict.fromkeys(layer_sets, 0)
        shards: list[Shard] = []
        for layers, _, _ in self.copies:
            start = seen[layers] * CHUNK_ELEMENTS
            seen[layers] += 1
            shards.append(Shard(block=layer_sets.index(layers), start=start, stop=start + CHUNK_ELEMENTS))  # type: ignore[arg-type]
        return ModelShape(len(self.hosts), blocks, tuple(shards))

    def stages(self) -> tuple[Stage, ...]:
        """Each layer is a stage unless `stage_ends` says otherwise."""
        ends = self.stage_ends or tuple(range(1, len(self.hosts) + 1))
        starts = (0, *ends[:-1])
        return tuple(Stage(first=Layer(a), last=Layer(b)) for a, b in zip(starts, ends, strict=True))

    def plan(self) -> Plan:
        """The plan of epoch 1."""
        hosting: dict[WorkerId, tuple[Layer, ...]] = {WorkerId(w): () for w in range(self.workers)}
        for layer, hosts in enumerate(self.hosts):
            for host in hosts:
                hosting[WorkerId(host)] = (*hosting[WorkerId(host)], Layer(layer))
        by_stage = [tuple(WorkerId(w) for w in self.hosts[stage.first]) for stage in self.stages()]
        groups = tuple(
            Group(owner=WorkerId(owner), replicas=tuple(WorkerId(w) for w in replicas))
            for _, owner, replicas in self.copies
        )
        routes = balanced_routes(self.stages(), by_stage, self.micro_batches, Epoch(1))
        members = tuple(
            Member(worker=WorkerId(w), node=NodeId(f"n{w}"), local_index=0, incarnation=0) for w in range(self.workers)
        )
        table = RouteTable(first_step=Step(0), routes=routes)
        return Plan(epoch=Epoch(1), reason="start", members=members, hosting=hosting, tables=(table,), groups=groups)


@dataclass
class WorkerShell:
    """The symbolic shell of one worker: what a real one keeps in tensors."""

    protocol: StepProtocol
    up: bool = True
    left: bool = False
    states: dict[ShardId, tuple[Value, ...]] = field(default_factory=dict)
    parameters: dict[ShardId, tuple[Value, ...]] = field(default_factory=dict)
    sums: dict[SumKey, Value] = field(default_factory=dict)

    def clone(self) -> "WorkerShell":
        states, parameters, sums = self.states.copy(), self.parameters.copy(), self.sums.copy()
        return WorkerShell(self.protocol.clone(), self.up, self.left, states, parameters, sums)


@dataclass(frozen=True, slots=True)
class Message:
    """A fact in flight."""

    fact: Fact
    payload: object


class World:
    """All workers, all links, all persisted plans."""

    def __init__(self, scene: Scene, protocol: type[StepProtocol] = StepProtocol) -> None:
        self.scene = scene
        plan = scene.plan()
        self.context = PlanningContext(
            shape=scene.shape(), stages=scene.stages(), replicas=scene.replicas, micro_batches=scene.micro_batches
        )
        job = JobFacts(
            shape=self.context.shape, micro_batches=scene.micro_batches, start_step=Step(0), steps=scene.steps
        )
        self.job = job
        self.plans = [plan]
        self.net: dict[tuple[int, int], tuple[Message, ...]] = {}
        self.reports: dict[WorkerId, MemberReport] = {}
        self.swaps: frozenset[tuple[ShardId, WorkerId]] = frozenset()
        self.crashes, self.suspicions, self.swap_budget = scene.crashes, scene.suspicions, scene.swaps
        self.ever_excluded: frozenset[int] = frozenset()
        self.over: str | None = None
        self.run_hops: frozenset[tuple[int, Hop, int]] = frozenset()
        self.redone = 0
        self.seen: set[str] = set()
        self.workers: list[WorkerShell] = []
        for index in range(scene.workers):
            shell = WorkerShell(protocol(WorkerId(index), job, plan))
            shell.protocol.start_fresh()
            shell.states = {shard: () for shard in shell.protocol.copies}
            shell.parameters = {shard: () for shard in shell.protocol.parameters}
            self.workers.append(shell)
        for index in range(scene.workers):
            self.perform(index)
            self.take_report(index)

    @property
    def plan(self) -> Plan:
        """The newest persisted plan."""
        return self.plans[-1]

    def members(self) -> list[int]:
        """Workers that the newest plan counts on."""
        return sorted(self.plan.ids)

    # ------------------------------------------------------------------ effects

    def perform(self, index: int) -> None:
        """Do what the worker's protocol asks for until it asks for nothing."""
        shell = self.workers[index]
        while effects := shell.protocol.take_effects():
            for effect in effects:
                self._perform_one(index, shell, effect)

    def _perform_one(self, index: int, shell: WorkerShell, effect: do.Effect) -> None:
        match effect:
            case do.Send():
                self._send(index, shell, effect)
            case do.Combine():
                self._combine(shell, effect)
            case do.Apply():
                if len(shell.states[effect.shard]) != effect.version:
                    raise Violation(f"w{index} applies {effect.version} at {len(shell.states[effect.shard])}")
                shell.states[effect.shard] = (*shell.states[effect.shard], effect.reduced)  # type: ignore[arg-type]
            case do.InstallParameters() | do.InstallState():
                target = shell.parameters if isinstance(effect, do.InstallParameters) else shell.states
                target[effect.shard] = effect.payload  # type: ignore[assignment]
                self._check_length(index, effect.shard, target, effect.version)
            case do.InstallOwnParameters():
                shell.parameters[effect.shard] = shell.states[effect.shard]
                self._check_length(index, effect.shard, shell.parameters, effect.version)
            case do.DropCopy():
                shell.states.pop(effect.shard, None)
            case do.StepDecided():
                self._check_loss(effect)
                shell.sums = {key: sum_ for key, sum_ in shell.sums.items() if key.step > effect.decision.step}
            case do.HostLayers() | do.DiscardHop():
                pass

    def _check_length(self, index: int, shard: ShardId, values: dict[ShardId, tuple[Value, ...]], version: int) -> None:
        if len(values[shard]) != version:
            raise Violation(f"w{index} takes shard {shard} at {len(values[shard])} for version {version}")

    def _check_loss(self, effect: do.StepDecided) -> None:
        expected = sum(4**m for m in range(self.scene.micro_batches))
        if effect.decision.loss.loss != expected:
            raise Violation(f"the loss of step {effect.decision.step} counts {effect.decision.loss.loss:#x}")

    def _combine(self, shell: WorkerShell, effect: do.Combine) -> None:
        value = tuple(sorted(pair for part in effect.parts for pair in part))  # type: ignore[attr-defined]
        layers = self.context.shape.layers_of_shard(effect.shard)
        expected = tuple(sorted((layer, m) for layer in layers for m in range(self.scene.micro_batches)))
        if value != expected:
            raise Violation(f"gradient of shard {effect.shard} in step {effect.step} is {value}")
        shell.protocol.combined(effect.step, effect.shard, ShardScalars(), value)

    def _send(self, index: int, shell: WorkerShell, effect: do.Send) -> None:
        payload = effect.payload
        fact = effect.fact
        if isinstance(fact, Partial):
            payload = shell.sums[SumKey(fact.step, fact.layer, fact.epoch)]
            if sum(1 << m for _, m in payload) != fact.coverage:
                raise Violation(f"w{index} sends {payload} as {fact.coverage:#b}")
        elif isinstance(fact, Parameters | State):
            payload = shell.states[fact.shard]
            if len(shell.states[fact.shard]) != fact.version:
                raise Violation(f"w{index} sends version {fact.version} at {len(shell.states[fact.shard])}")
        to = self.workers[effect.to]
        if effect.to == index:
            shell.protocol.receive(WorkerId(index), fact, payload)
        elif to.up and not to.left and shell.up:
            link = (index, int(effect.to))
            self.net[link] = (*self.net.get(link, ()), Message(fact, payload))

    # ------------------------------------------------------------------ steps of one worker

    def deliver(self, source: int, target: int) -> None:
        """The oldest message of a link arrives."""
        queue = self.net.pop((source, target))
        if len(queue) > 1:
            self.net[(source, target)] = queue[1:]
        shell = self.workers[target]
        if shell.up and not shell.left:
            shell.protocol.receive(WorkerId(source), queue[0].fact, queue[0].payload)
            self.perform(target)

    def ready_hops(self, index: int) -> list[tuple[MicroBatch, Hop, bool]]:
        """Hops that this worker could run now."""
        protocol = self.workers[index].protocol
        found: list[tuple[MicroBatch, Hop, bool]] = []
        if protocol.step >= self.scene.steps:
            return found
        for micro_batch, hop in protocol.my_hops():
            if protocol.can_backward(micro_batch, hop):
                found.append((micro_batch, hop, True))
            elif protocol.can_forward(micro_batch, hop):
                found.append((micro_batch, hop, False))
        return found

    def run_hop(self, index: int, micro_batch: MicroBatch, hop: Hop, backward: bool) -> None:
        """Run one hop, symbolically."""
        shell = self.workers[index]
        protocol = shell.protocol
        for layer in range(hop.first, hop.last):
            for shard in self.context.shape.shards_of_layer[layer]:
                if len(shell.parameters.get(shard, ())) != protocol.step:
                    version = len(shell.parameters.get(shard, ()))
                    raise Violation(f"w{index} computes step {protocol.step} of layer {layer} at version {version}")
        if backward:
            self._note_work(index, protocol.step, micro_batch, hop)
            is_last = hop.last == self.context.shape.layers
            loss = LossScalars(loss=4**micro_batch, tokens=1) if is_last else None
            for layer in range(hop.first, hop.last):
                key = SumKey(protocol.step, Layer(layer), hop.epoch)
                shell.sums[key] = (*shell.sums.get(key, ()), (layer, int(micro_batch)))
            protocol.backward_done(micro_batch, hop, None, loss)
        else:
            protocol.forward_done(micro_batch, hop, None)
        self.perform(index)

    def _note_work(self, index: int, step: int, micro_batch: MicroBatch, hop: Hop) -> None:
        plain = replace(hop, epoch=Epoch(0), worker=WorkerId(0))
        for other_step, other, other_batch in self.run_hops:
            same = replace(other, epoch=Epoch(0), worker=WorkerId(0)) == plain
            if (other_step, other_batch) == (step, micro_batch) and same:
                self.redone += 1
                untouched = not {int(other.worker), index} & self.ever_excluded
                if other.worker != index and untouched and "routes" not in self.seen:
                    raise Violation(f"work of live worker {other.worker} redone by {index}: {step}, {micro_batch}")
        self.run_hops |= {(step, hop, int(micro_batch))}

    def adopt(self, index: int) -> None:
        """The worker takes over the next plan."""
        shell = self.workers[index]
        plan = self.plans[shell.protocol.plan.epoch]  # epochs start at 1, so this is the next one
        before, step = self.ready_hops(index), shell.protocol.step
        shell.protocol.adopt(plan)
        kept = {(m, hop) for m, hop in shell.protocol.my_hops()}
        after = self.ready_hops(index)
        for found in before:
            if shell.protocol.step == step and found[:2] in kept and found not in after:
                raise Violation(f"plan {plan.epoch} stopped work of w{index} that it does not touch: {found}")
        self.perform(index)
        if plan.finished:
            shell.left = True

    def take_report(self, index: int) -> None:
        """The worker's report reaches the controller."""
        report = self.workers[index].protocol.report()
        before = self.reports.get(WorkerId(index))
        self.reports[WorkerId(index)] = merge_report(before, report)

    def crash(self, index: int) -> None:
        """The worker dies with everything it had in flight."""
        self.workers[index].up = False
        self.ever_excluded |= {index}
        self.net = {link: queue for link, queue in self.net.items() if index not in link}

    # ------------------------------------------------------------------ exploration

    def clone(self) -> Self:
        """An independent copy."""
        other = object.__new__(type(self))
        other.__dict__.update(self.__dict__)
        other.plans = self.plans.copy()
        other.net = self.net.copy()
        other.reports = self.reports.copy()
        other.seen = self.seen.copy()
        other.workers = [shell.clone() for shell in self.workers]
        return other

    def fingerprint(self) -> int:
        """Hash of everything that future behaviour depends on."""
        shells = tuple(
            (
                shell.left,
                shell.protocol.fingerprint(),
                frozenset(shell.states.items()),
                frozenset(shell.parameters.items()),
            )
            if shell.up
            else None
            for shell in self.workers
        )
        last = self.plan
        routes = tuple(table.routes for table in last.tables)
        view = (
            last.epoch,
            tuple(sorted(last.ids)),
            routes,
            last.groups,
            last.finished,
            frozenset(last.hosting.items()),
        )
        budgets = (self.crashes, self.suspicions, self.swap_budget, self.over, self.swaps, self.ever_excluded)
        return hash((shells, frozenset(self.net.items()), view, budgets))


def merge_report(before: MemberReport | None, report: WorkerReport) -> MemberReport:
    """The controller's knowledge of a member after one more report."""
    adopted = dict(before.adopted_at) if before is not None else {}
    adopted.update(report.adoptions)
    return MemberReport(
        epoch=report.epoch,
        step=report.step,
        adopted_at=adopted,
        versions={held.shard: held.version for held in report.held},
        reduced={held.shard: held.reduced for held in report.held},
        hosted_ready=report.hosted_ready,
        finished=report.finished,
    )
