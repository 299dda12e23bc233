"""Reduce and decide: partial sums to owners, reduced gradients to the group, "have" to all (rules 3.3, 3.7, 4)."""

from collections.abc import Mapping, Sequence

from elaswave.core.facts import Decided, Decision, Have, LossScalars, Partial, Reduced, ShardScalars
from elaswave.core.ids import Coverage, ShardId, Step, WorkerId
from elaswave.core.protocol.effects import Combine, Payload, Send
from elaswave.core.protocol.ring import RingProtocol
from elaswave.core.protocol.state import PartialSum, ReducedShard, SumKey, SumSource
from elaswave.errors import InvariantError


class ReductionProtocol(RingProtocol):
    """From contributions to the decision of a step."""

    # ------------------------------------------------------------------ partial sums

    def send_partials(self, key: SumKey) -> None:
        """Send the accumulator towards the owners of its layer's shards once all its hops under the plan are in."""
        wanted = self.my_sums.get((key.layer, key.epoch), 0)
        coverage = self.coverage.get(key, Coverage(0))
        if not wanted or wanted & ~coverage:
            return
        for shard in self.job.shape.shards_of_layer[key.layer]:
            if not self.pass_on(key.layer, shard):
                self._send_directly(key, shard, coverage)

    def _send_directly(self, key: SumKey, shard: ShardId, coverage: Coverage) -> None:
        owner = self.plan.groups[shard].owner
        if owner is None or self.sent_partials.get((key, shard)) == (owner, coverage):
            return
        self.sent_partials[(key, shard)] = (owner, coverage)
        loss = self._loss_of(key) if self.carries_loss(key.layer, shard) else None
        fact = Partial(step=key.step, shard=shard, layer=key.layer, epoch=key.epoch, coverage=coverage, loss=loss)
        self.effects.append(Send(to=owner, fact=fact))

    def send_partials_again(self, receivers: tuple[WorkerId, ...]) -> None:
        """What these workers were sent may not have arrived: `settle` sends it again."""
        self.sent_partials = {key: sent for key, sent in self.sent_partials.items() if sent[0] not in receivers}
        self.passed_on = {key: to for key, to in self.passed_on.items() if to not in receivers}

    def receive_partial(self, source: WorkerId, fact: Partial, payload: Payload) -> None:
        """The newest set of one accumulator replaces the one before; kept also where this worker is no owner."""
        sums = self.partials.setdefault((fact.step, fact.shard), {})
        sums[(source, fact.layer, fact.epoch, fact.running)] = PartialSum(fact.coverage, fact.loss, payload)
        if fact.step == self.step:
            self.pass_on(fact.layer, fact.shard)
            self.try_combine(fact.shard)

    def try_combine(self, shard: ShardId) -> None:
        """As owner, add up a disjoint exact cover of every layer of the shard (rule 3.3)."""
        pair = (self.step, shard)
        if self.plan.groups[shard].owner != self.me or shard not in self.copies:
            return
        if pair in self.reduced or pair in self.combining or self.step >= self.job.steps:
            return
        sums = self.partials.get(pair, {})
        chosen: list[PartialSum] = []
        for layer in self.job.shape.layers_of_shard(shard):
            of_layer = {key: found for key, found in sums.items() if key[1] == layer}
            cover = self.find_cover(of_layer)
            if cover is None:
                return
            chosen += cover
        self.combining[pair] = None
        self.effects.append(Combine(step=self.step, shard=shard, parts=tuple(found.payload for found in chosen)))

    def find_cover(self, sums: Mapping[SumSource, PartialSum]) -> list[PartialSum] | None:
        """Disjoint partial sums that hold every micro-batch once, or None."""
        return exact_cover(self.job.full, [sums[key] for key in sorted(sums)])

    def combined(self, step: Step, shard: ShardId, scalars: ShardScalars, payload: Payload) -> None:
        """Answer to Combine. `scalars.loss` is filled in here for the loss shard."""
        self.combining.pop((step, shard), None)
        if step != self.step:
            return
        if shard == self.job.shape.loss_shard:
            scalars = ShardScalars(
                norm_squared=scalars.norm_squared, finite=scalars.finite, loss=self._total_loss(step, shard)
            )
        self.reduced[(step, shard)] = ReducedShard(scalars, payload)
        self._reduced_known(shard)

    def _total_loss(self, step: Step, shard: ShardId) -> LossScalars:
        last = self.job.shape.layers - 1
        sums = {key: found for key, found in self.partials[(step, shard)].items() if key[1] == last}
        cover = self.find_cover(sums)
        if cover is None:
            raise InvariantError(f"step {step}: the loss of shard {shard} was combined without an exact cover")
        total = LossScalars()
        for found in cover:
            total = total + (found.loss or LossScalars())
        return total

    # ------------------------------------------------------------------ reduced gradients

    def receive_reduced(self, fact: Reduced, payload: Payload) -> None:
        """Keep it until the copy here has applied it."""
        if fact.shard in self.copies and fact.step < self.copies[fact.shard]:
            return
        self.reduced.setdefault((fact.step, fact.shard), ReducedShard(fact.scalars, payload))
        if fact.step == self.step:
            self._reduced_known(fact.shard)
        elif fact.step < self.step:
            self.catch_up_copy(fact.shard)

    def catch_up_copy(self, shard: ShardId) -> None:
        """Part of the handling of copies; defined there."""
        raise NotImplementedError

    def _reduced_known(self, shard: ShardId) -> None:
        self.forward_reduced(shard)
        self.say_have()

    def forward_reduced(self, shard: ShardId) -> None:
        """As owner, pass the reduced gradient on to the whole group, however it came here (rule 4.1)."""
        pair = (self.step, shard)
        group = self.plan.groups[shard]
        if group.owner == self.me and pair in self.reduced and self.sent_reduced.get(pair) != group:
            self.sent_reduced[pair] = group
            self.send_reduced(self.step, shard, group.everyone)

    def send_reduced(self, step: Step, shard: ShardId, to: tuple[WorkerId, ...]) -> None:
        """Send a reduced gradient, if it is here."""
        found = self.reduced.get((step, shard))
        if found is not None:
            fact = Reduced(step=step, shard=shard, scalars=found.scalars)
            for worker in to:
                if worker != self.me:
                    self.effects.append(Send(to=worker, fact=fact, payload=found.payload))

    # ------------------------------------------------------------------ decide

    def say_have(self) -> None:
        """Say what is held, in one message once every gating copy here can be named (rule 4.3)."""
        if self.step >= self.job.steps:
            return
        have = self.have.setdefault(self.step, {})
        news: list[tuple[ShardId, ShardScalars]] = []
        waiting = False
        for shard, version in self.copies.items():
            if (self.me, shard) in have:
                continue
            found = self.reduced.get((self.step, shard))
            if found is not None and self.counts_as_held(version):
                news.append((shard, found.scalars))
            elif self.me in self.plan.groups[shard].gating:
                waiting = True
        if news and not waiting:
            for shard, scalars in news:
                have[(self.me, shard)] = scalars
            self._send_have(tuple(sorted(news, key=lambda item: item[0])), self._others())
            self.try_decide()

    def counts_as_held(self, version: int) -> bool:
        """A copy with the reduced gradient of the step counts only at the version of the step."""
        return version == self.step

    def tell_have(self, to: tuple[WorkerId, ...]) -> None:
        """Repeat to these workers all that this worker has said in the step under way."""
        said = [(shard, scalars) for (who, shard), scalars in self.have.get(self.step, {}).items() if who == self.me]
        if said:
            self._send_have(tuple(sorted(said, key=lambda item: item[0])), to)

    def _send_have(self, entries: tuple[tuple[ShardId, ShardScalars], ...], to: tuple[WorkerId, ...]) -> None:
        fact = Have(step=self.step, entries=entries)
        self.effects += [Send(to=worker, fact=fact) for worker in to]

    def _others(self) -> tuple[WorkerId, ...]:
        return tuple(sorted(worker for worker in self.plan.ids if worker != self.me))

    def receive_have(self, source: WorkerId, fact: Have) -> None:
        """A fact without epoch: it stays true (rule 4.4)."""
        have = self.have.setdefault(fact.step, {})
        for shard, scalars in fact.entries:
            have[(source, shard)] = scalars
        if fact.step == self.step:
            self.try_decide()

    def try_decide(self) -> None:
        """Decided when owner and every gating copy of every shard, in this view, have said so (rule 4.4)."""
        if self.step >= self.job.steps:
            return
        have = self.have.get(self.step)
        if not have:
            return
        for shard, group in enumerate(self.plan.groups):
            if group.owner is None or any((worker, shard) not in have for worker in self.needed(ShardId(shard))):
                return
        self.learn(self._decision(have))

    def needed(self, shard: ShardId) -> tuple[WorkerId, ...]:
        """Copies whose "have" a decision needs."""
        return self.plan.groups[shard].gating

    def _decision(self, have: Mapping[tuple[WorkerId, ShardId], ShardScalars]) -> Decision:
        norm_squared, finite, loss = 0, True, LossScalars()
        for shard, group in enumerate(self.plan.groups):
            assert group.owner is not None  # held by try_decide
            scalars = have[(group.owner, ShardId(shard))]
            norm_squared += scalars.norm_squared
            finite = finite and scalars.finite
            loss = scalars.loss or loss
        return Decision(step=self.step, norm_squared=norm_squared, finite=finite, loss=loss)

    def learn(self, decision: Decision) -> None:
        """Part of the handling of decisions; defined with the copies."""
        raise NotImplementedError

    def tell_decided(self, to: tuple[WorkerId, ...]) -> None:
        """Tell the last decision known here."""
        decision = self.decisions.get(Step(self.step - 1))
        if decision is not None:
            for worker in to:
                if worker != self.me:
                    self.effects.append(Send(to=worker, fact=Decided(decision=decision)))


def exact_cover(full: Coverage, sums: Sequence[PartialSum]) -> list[PartialSum] | None:
    """Disjoint members of `sums` whose union is `full`; the first such choice in the given order, or None."""
    # Not an inner function: one that calls itself is a cycle, and would keep all payloads until garbage is collected.
    if not full:
        return []
    for position, found in enumerate(sums):
        if found.coverage and not found.coverage & ~full:
            rest = exact_cover(Coverage(full & ~found.coverage), sums[position + 1 :])
            if rest is not None:
                return [found, *rest]
    return None
