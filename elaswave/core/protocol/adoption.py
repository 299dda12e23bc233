"""Adoption of the next plan: compare, send what its changes make necessary, go on (rules 3.6, 3.7, 4.2, 4.9, 5, 6)."""

from elaswave.core.ids import MicroBatch, ShardId, WorkerId
from elaswave.core.plan import Group, Plan
from elaswave.core.protocol.copies import CopyProtocol
from elaswave.core.protocol.effects import DiscardHop, DropCopy, HostLayers, InstallParameters
from elaswave.errors import ProtocolError


class AdoptionProtocol(CopyProtocol):
    """What a plan changes; no answer is awaited and nothing stops."""

    def adopt(self, plan: Plan) -> None:
        """Take over the plan that follows the one in force. Raises ProtocolError for a gap in the epochs."""
        old = self.plan
        if plan.epoch != old.epoch + 1:
            raise ProtocolError(
                f"worker {self.me} got plan {plan.epoch} after plan {old.epoch}: plans come without gaps"
            )
        self.plan = plan
        self.forget_views()
        self.adoptions.append((plan.epoch, self.step))
        self._adopt_copies(plan)
        self._adopt_hosting(old, plan)
        self._adopt_routes(old, plan)
        self.tell_newcomers(old, plan)
        for index, group in enumerate(plan.groups):
            self._adopt_group(ShardId(index), old.groups[index], group, old)
        self.look_again_at_held()
        self.tell_new_gates(old, plan)
        if self.me not in old.ids and not self.excluded:
            self.tell_have(self._others())
        self.settle()

    # ------------------------------------------------------------------ what is mine

    def _adopt_copies(self, plan: Plan) -> None:
        """Drop copies that the plan gives to others, never under a plan without owner (rule 5.3)."""
        if self.excluded:
            return
        for shard in list(self.copies):
            group = plan.groups[shard]
            if self.me not in group.everyone and self.may_drop(group):
                del self.copies[shard]
                self.effects.append(DropCopy(shard=shard))

    def may_drop(self, group: Group) -> bool:
        """A copy is dropped only by a plan that names an owner."""
        return group.owner is not None

    def _adopt_hosting(self, old: Plan, plan: Plan) -> None:
        layers = plan.hosting.get(self.me, ())
        if layers == old.hosting.get(self.me, ()):
            return
        self.effects.append(HostLayers(layers=layers))
        for shard in [shard for shard in self.parameters if self.me not in self.hosts(shard)]:
            del self.parameters[shard]
        for shard in [shard for shard in self.early_parameters if self.me in self.hosts(shard)]:
            version, payload = self.early_parameters.pop(shard)
            if version > self.parameters.get(shard, -1):
                self.parameters[shard] = version
                self.effects.append(InstallParameters(shard=shard, version=version, payload=payload))
        for shard in self.copies:
            self._copy_changed(shard)
        self.ask_for_parameters()

    def _adopt_routes(self, old: Plan, plan: Plan) -> None:
        if self.step >= self.job.steps:
            return
        before, after = old.table(self.step).routes, plan.table(self.step).routes
        for index, (was, now) in enumerate(zip(before, after, strict=True)):
            if was is now or was == now:
                continue
            micro_batch = MicroBatch(index)
            for hop in was:
                key = self._hop_key(micro_batch, hop)
                if hop.worker == self.me and hop not in now and key in self.forwards:
                    del self.forwards[key]
                    self.effects.append(
                        DiscardHop(step=self.step, micro_batch=micro_batch, first=hop.first, last=hop.last)
                    )
            self.resend_edges(was, now, micro_batch)

    # ------------------------------------------------------------------ what others need

    def tell_newcomers(self, old: Plan, plan: Plan) -> None:
        """Tell workers that the plan lets in the last decision and what was said here (rule 5.6).

        Their sums go to them again, where they own what they owned before: a link may have broken meanwhile.
        """
        newcomers = tuple(sorted(plan.ids - old.ids - {self.me}))
        if newcomers:
            self.tell_decided(newcomers)
            self.tell_have(newcomers)
            self.send_partials_again(newcomers)

    def _adopt_group(self, shard: ShardId, was: Group, now: Group, old: Plan) -> None:
        if was != now:
            self.reforward(shard, now)
            if now.owner == self.me and was.owner != self.me and shard in self.copies:
                self.publish_as_new_owner(shard)
        if self.me in now.everyone and self.copies.get(shard, -1) < self.step:
            self.ask_for_state(shard)
        if now.owner == self.me and was.owner == self.me and shard in self.copies:
            self.publish_to_new_hosts(shard, old)

    def reforward(self, shard: ShardId, group: Group) -> None:
        """Whoever holds the reduced gradient under way sends it to the changed group (rule 4.2)."""
        self.send_reduced(self.step, shard, group.everyone)

    def publish_as_new_owner(self, shard: ShardId) -> None:
        """What the owner before published may be lost: publish again (rule 4.9)."""
        self.publish(shard, self.hosts(shard))

    def publish_to_new_hosts(self, shard: ShardId, old: Plan) -> None:
        """An owner publishes to hosts that the plan adds (rule 4.9)."""
        layers = self.job.shape.layers_of_shard(shard)
        before = {host for layer in layers for host in old.hosts_of_layer.get(layer, ())}
        self.publish(shard, tuple(host for host in self.hosts(shard) if host not in before))

    def look_again_at_held(self) -> None:
        """Messages refused under the old plan get a second look (rule 5.5)."""
        held, self.held = self.held, []
        for source, fact, payload in held:
            self.receive(source, fact, payload)

    def receive(self, source: WorkerId, fact: object, payload: object) -> None:
        """Part of the whole protocol; defined there."""
        raise NotImplementedError

    def tell_new_gates(self, old: Plan, plan: Plan) -> None:
        """A copy that begins to gate is told the last decision by its group, and tells all what it knows (rule 6.4)."""
        if self.step == self.job.start_step:
            return
        i_gate = False
        told: set[WorkerId] = set()
        for was, now in zip(old.groups, plan.groups, strict=True):
            if was is now or was == now:
                continue
            new = set(now.gating) - set(was.gating)
            i_gate = i_gate or self.me in new
            if self.me in now.gating:
                told |= new - {self.me}
        self.tell_gates(tuple(sorted(told)))
        if i_gate:
            self.tell_as_gate(tuple(sorted(plan.ids - {self.me})))

    def tell_gates(self, gates: tuple[WorkerId, ...]) -> None:
        """As one of the group, tell copies that begin to gate what they may have missed."""
        self.tell_decided(gates)

    def tell_as_gate(self, others: tuple[WorkerId, ...]) -> None:
        """As a copy that begins to gate, tell what is decided: others may wait for a "have" that never comes."""
        self.tell_decided(others)
