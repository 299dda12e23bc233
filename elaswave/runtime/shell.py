"""Performs what the protocol asks for, on tensors: the impure half of a worker's part in a step."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import cast

import torch
from torch import Tensor

from elaswave.comm.links import Links
from elaswave.core import facts
from elaswave.core.facts import Decision, Fact
from elaswave.core.ids import Coverage, Layer, MicroBatch, ShardId, Step, WorkerId
from elaswave.core.protocol import effects as do
from elaswave.core.protocol.state import EdgeKey, HopKey, SumKey
from elaswave.core.protocol.worker import StepProtocol
from elaswave.core.shape import ModelShape
from elaswave.errors import InvariantError, LinkClosed
from elaswave.job import Job
from elaswave.runtime.accumulation import Accumulation
from elaswave.runtime.codec import bytes_of_tensor, describe_tensor, encode_fact
from elaswave.runtime.hops import HopRunner, LayerContribution
from elaswave.runtime.host_memory import HostMemory
from elaswave.runtime.ledger import LayerAccumulator, Tag, layer_accumulator
from elaswave.runtime.model import PARAMETER_DTYPES, HostedModel
from elaswave.runtime.optimizer import Update, Updater, update_of
from elaswave.runtime.reduction import reduce_shard
from elaswave.runtime.shards import ShardState, parameters_of, state_from_bytes

OnPhase = Callable[[Step, str], None]
OnDecided = Callable[[Decision, Update], None]


@dataclass(slots=True, kw_only=True)
class OrderedEdges:
    """Values that wait for their place in the total order of an unbuffered transport.

    edges: those of the program that no plan has taken out of the order. ready: produced, not yet sent.
    """

    edges: set[EdgeKey] = field(default_factory=set)
    ready: dict[EdgeKey, do.Send] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class ShellParts:
    """What the shell drives; owned by the session."""

    job: Job
    shape: ModelShape
    protocol: StepProtocol
    model: HostedModel
    runner: HopRunner
    accumulation: Accumulation
    links: Links
    memory: HostMemory


class ProtocolShell:
    """Tensors of one worker by the protocol's keys: accumulators, copies of shards, hosted parameters."""

    def __init__(
        self, parts: ShellParts, states: dict[ShardId, ShardState], on_phase: OnPhase, on_decided: OnDecided
    ) -> None:
        self._parts = parts
        self.protocol = parts.protocol
        self.states = states
        self.ordered = OrderedEdges()
        self._updater = Updater(parts.job.optimizer)
        self._dtype = PARAMETER_DTYPES[parts.job.parameter_dtype]
        self._sums: dict[SumKey, LayerAccumulator] = {}
        self._updates: dict[Step, Update] = {}
        self._published: dict[ShardId, Tensor] = {}
        self._held: set[WorkerId] = set()  # peers to which something waits for more to follow
        self._on_phase = on_phase
        self._on_decided = on_decided

    def perform(self) -> None:
        """Do everything that the protocol has asked for until it asks for nothing more."""
        while effects := self.protocol.take_effects():
            for found, group in groupby(effects, _is_send):
                if found:
                    self._send_all(cast(list[do.Send], list(group)))
                else:
                    for effect in group:
                        self._perform_one(effect)

    def _perform_one(self, effect: do.Effect) -> None:
        match effect:
            case do.Send():
                self._send(effect)
            case do.Combine():
                self._combine(effect)
            case do.PassOn():
                self._pass_on(effect)
            case do.Apply():
                self._apply(effect)
            case do.InstallParameters():
                self._parts.model.install(self._parts.shape.shards[effect.shard], cast(Tensor, effect.payload))
            case do.InstallOwnParameters():
                self._on_phase(Step(max(0, effect.version - 1)), "publish")
                own = parameters_of(self.states[effect.shard], self._dtype)
                self._parts.model.install(self._parts.shape.shards[effect.shard], own)
            case do.InstallState():
                elements = self._parts.shape.shards[effect.shard].elements
                received = cast(Tensor, effect.payload)
                self.states[effect.shard] = state_from_bytes(self._parts.job.optimizer, elements, received)
                self._published.pop(effect.shard, None)
            case do.DropCopy():
                del self.states[effect.shard]
                self._published.pop(effect.shard, None)
            case do.HostLayers():
                self._parts.model.host(effect.layers)
            case do.DiscardHop():
                key = HopKey(step=effect.step, micro_batch=effect.micro_batch, first=effect.first, last=effect.last)
                self._parts.runner.discard(key)
            case do.StepDecided():
                self._step_decided(effect.decision)

    # ------------------------------------------------------------------ contributions

    def accumulate(self, micro_batch: MicroBatch, epoch_key: SumKey, contribution: LayerContribution) -> None:
        """Add one layer's contribution to its accumulator, once."""
        found = self._sums.get(epoch_key)
        if found is None:
            found = self._sums[epoch_key] = layer_accumulator(self._parts.accumulation, contribution.blocks)
        if not found.add_if(Tag(micro_batch=micro_batch), contribution.blocks):
            raise InvariantError(f"micro-batch {micro_batch} is in accumulator {epoch_key} already")

    def _partial(self, fact: facts.Partial) -> Tensor:
        found = self._accumulator(SumKey(fact.step, fact.layer, fact.epoch))
        _check_coverage(fact, found.coverage)
        return self._slice(found, fact.shard)

    def _accumulator(self, key: SumKey) -> LayerAccumulator:
        found = self._sums.get(key)
        if found is None:
            raise InvariantError(f"no accumulator for {key}")
        return found

    def _slice(self, found: LayerAccumulator, index: ShardId) -> Tensor:
        shard = self._parts.shape.shards[index]
        return found.partial(shard) if shard.elements else torch.empty(0, dtype=self._parts.accumulation.dtype)

    def _pass_on(self, effect: do.PassOn) -> None:
        fact = effect.fact
        self._on_phase(fact.step, "reduce")
        parts = [cast(Tensor, effect.payload)] if effect.before else []
        covered = effect.before
        for epoch in effect.accumulators:
            found = self._accumulator(SumKey(fact.step, fact.layer, epoch))
            if found.coverage & covered:
                raise InvariantError(f"{found.coverage:#x} is added to a running sum of {covered:#x}: they overlap")
            covered = Coverage(covered | found.coverage)
            parts.append(self._slice(found, fact.shard))
        _check_coverage(fact, covered)
        total = parts[0] if len(parts) == 1 else self._parts.accumulation.combine(parts)
        self.send_fact(effect.to, fact, total)

    def _combine(self, effect: do.Combine) -> None:
        self._on_phase(effect.step, "reduce")
        parts = [cast(Tensor, part) for part in effect.parts]
        gradient, scalars = reduce_shard(self._parts.accumulation, parts, self._parts.job.micro_batches)
        self.protocol.combined(effect.step, effect.shard, scalars, gradient)

    # ------------------------------------------------------------------ decisions and updates

    def _step_decided(self, decision: Decision) -> None:
        self._sums = {key: found for key, found in self._sums.items() if key.step > decision.step}
        self._parts.runner.discard_through(decision.step)
        self.ordered = OrderedEdges()
        update = self._update(decision)
        self._updates = {step: found for step, found in self._updates.items() if step in self.protocol.decisions}
        self._on_decided(decision, update)

    def _update(self, decision: Decision) -> Update:
        found = self._updates.get(decision.step)
        if found is None:
            found = self._updates[decision.step] = update_of(self._parts.job, decision)
        return found

    def _apply(self, effect: do.Apply) -> None:
        self._on_phase(Step(effect.version), "update")
        self._published.pop(effect.shard, None)
        self._updater.apply(self.states[effect.shard], cast(Tensor, effect.reduced), self._update(effect.decision))

    # ------------------------------------------------------------------ sending

    def _send_all(self, effects: Sequence[do.Send]) -> None:
        """What goes to one peer goes to the kernel together: a call of it, and waking the peer, cost most of a send."""
        last = {effect.to: place for place, effect in enumerate(effects)}
        for place, effect in enumerate(effects):
            self._send(effect, more=place < last[effect.to])
        for peer in self._held:
            self._parts.links.release(peer)
        self._held.clear()

    def _send(self, effect: do.Send, *, more: bool = False) -> None:
        fact = effect.fact
        if isinstance(fact, facts.Activation | facts.Gradient):
            key = edge_key(fact)
            if key in self.ordered.edges:
                self.ordered.ready[key] = effect
                return
        if isinstance(fact, facts.Have):
            self._on_phase(fact.step, "decide")
        elif isinstance(fact, facts.Parameters):
            self._on_phase(Step(max(0, fact.version - 1)), "publish")
        payload, copy = self._payload(effect)
        if effect.to == self.protocol.me:
            self.protocol.receive(effect.to, fact, payload)
        else:
            self.send_fact(effect.to, fact, payload, copy=copy, more=more)

    def _payload(self, effect: do.Send) -> tuple[Tensor | None, bool]:
        """The tensor, and whether it has to be copied: later work here changes its memory, or peers cannot see it."""
        fact = effect.fact
        if isinstance(fact, facts.Activation | facts.Gradient):
            return cast("Tensor | None", effect.payload), True
        if isinstance(fact, facts.Partial):
            return self._partial(fact), False
        if isinstance(fact, facts.Parameters):
            return self._publication(fact.shard), False
        if isinstance(fact, facts.State):
            return self.states[fact.shard].serialised(), True
        return cast("Tensor | None", effect.payload), False

    def _publication(self, shard: ShardId) -> Tensor:
        """A copy of the shard's parameters that stays as it is, one for all who get it."""
        found = self._published.get(shard)
        if found is None:
            master = self.states[shard].master
            found = self._published[shard] = self._parts.memory(master.numel(), self._dtype).copy_(master)
        return found

    def send_fact(
        self, to: WorkerId, fact: Fact, payload: Tensor | None, *, copy: bool = False, more: bool = False
    ) -> None:
        """Put a fact on the link; one that cannot be reached and is not in the plan gets nothing."""
        kind, meta = encode_fact(fact)
        data = None
        if payload is not None:
            describe_tensor(meta, payload)
            data = bytes_of_tensor(payload)
        if more:
            self._held.add(to)
        else:
            self._held.discard(to)
        try:
            self._parts.links.send(to, kind, meta.finish(), data, copy=copy, more=more)
        except LinkClosed:
            if to in self.protocol.plan.ids:
                raise


def _is_send(effect: do.Effect) -> bool:
    return isinstance(effect, do.Send)


def _check_coverage(fact: facts.Partial, coverage: Coverage) -> None:
    if coverage != fact.coverage:
        raise InvariantError(f"a sum to send holds {coverage:#x}, the protocol says {fact.coverage:#x}")


def edge_key(fact: facts.Activation | facts.Gradient) -> EdgeKey:
    """The key under which the protocol keeps this fact."""
    return EdgeKey(fact.step, fact.micro_batch, Layer(fact.cut), isinstance(fact, facts.Gradient))
