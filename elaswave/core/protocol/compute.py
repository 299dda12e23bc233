"""Compute part of the worker's protocol: which hops can run, what they produce, who gets it (rules 3.1 to 3.10)."""

from elaswave.core.facts import Activation, Gradient, LossScalars, NonFinite
from elaswave.core.ids import Coverage, Layer, MicroBatch, WorkerId
from elaswave.core.plan import Hop, Route
from elaswave.core.protocol.effects import Payload, Send
from elaswave.core.protocol.state import Edge, EdgeKey, HopKey, ProtocolState, SumKey


class ComputeProtocol(ProtocolState):
    """Hops of the step under way."""

    # ------------------------------------------------------------------ what can run

    def my_hops(self) -> list[tuple[MicroBatch, Hop]]:
        """Hops that the plan gives to this worker in the step under way, by micro-batch and layer."""
        routes = self.plan.table(self.step).routes
        return [(MicroBatch(m), hop) for m, route in enumerate(routes) for hop in route if hop.worker == self.me]

    def layers_ready(self, first: Layer, last: Layer) -> bool:
        """All parameters of these layers are at the version of the step under way (rule 3.8)."""
        shards = self.job.shape.shards_of_layer
        return all(self.parameters.get(s) == self.step for layer in range(first, last) for s in shards[layer])

    def can_forward(self, micro_batch: MicroBatch, hop: Hop) -> bool:
        """The forward pass has not run here, its input is here and its layers are ready."""
        if (
            self.step >= self.job.steps
            or self._hop_key(micro_batch, hop) in self.forwards
            or self.contributed(micro_batch, hop)
        ):
            return False
        has_input = hop.first == 0 or self._edge_key(micro_batch, hop.first, backward=False) in self.inputs
        return has_input and self.layers_ready(hop.first, hop.last)

    def can_backward(self, micro_batch: MicroBatch, hop: Hop) -> bool:
        """The forward pass has run here, the gradient is here, and the contribution is not made yet."""
        if self._hop_key(micro_batch, hop) not in self.forwards or self.contributed(micro_batch, hop):
            return False
        return hop.last == self.job.shape.layers or self._edge_key(micro_batch, hop.last, backward=True) in self.inputs

    def is_between(self, micro_batch: MicroBatch, hop: Hop) -> bool:
        """The forward pass has run here and its backward pass is still to come."""
        return self._hop_key(micro_batch, hop) in self.forwards

    def contributed(self, micro_batch: MicroBatch, hop: Hop) -> bool:
        """The hop's contribution is in the accumulators of its assignment epoch (deduplicated inside them only)."""
        mask = self.coverage.get(SumKey(self.step, hop.first, hop.epoch), 0)
        return bool(mask >> micro_batch & 1)

    def input_of(self, micro_batch: MicroBatch, cut: Layer, *, backward: bool) -> Edge | None:
        """The received activation or gradient, or None while it is not here."""
        return self.inputs.get(self._edge_key(micro_batch, cut, backward=backward))

    # ------------------------------------------------------------------ what has run

    def forward_done(
        self, micro_batch: MicroBatch, hop: Hop, output: Payload, non_finite: NonFinite | None = None
    ) -> None:
        """The forward pass of `hop` has run; `output` is the input of layer hop.last, unused behind the last layer."""
        self.forwards[self._hop_key(micro_batch, hop)] = None
        if hop.last < self.job.shape.layers:
            self._produce(self._edge_key(micro_batch, hop.last, backward=False), Edge(output, non_finite, hop))

    def backward_done(
        self, micro_batch: MicroBatch, hop: Hop, input_gradient: Payload, loss: LossScalars | None = None
    ) -> None:
        """The backward pass of `hop` has run and its contributions are in the accumulators (one indivisible act).

        `loss` is given by hops that end in the last layer.
        """
        del self.forwards[self._hop_key(micro_batch, hop)]
        for layer in range(hop.first, hop.last):
            key = SumKey(self.step, Layer(layer), hop.epoch)
            self.coverage[key] = Coverage(self.coverage.get(key, 0) | 1 << micro_batch)
            if loss is not None and layer == self.job.shape.layers - 1:
                self.losses[key] = self.losses.get(key, LossScalars()) + loss
        if hop.first > 0:
            self._produce(self._edge_key(micro_batch, hop.first, backward=True), Edge(input_gradient, None, hop))
        for layer in range(hop.first, hop.last):
            self.send_partials(SumKey(self.step, Layer(layer), hop.epoch))

    def send_partials(self, key: SumKey) -> None:
        """Part of the reduction; defined there."""
        raise NotImplementedError

    # ------------------------------------------------------------------ facts of edges

    def _produce(self, key: EdgeKey, edge: Edge) -> None:
        self.log[key] = edge
        self._send_edge(key, edge)

    def _send_edge(self, key: EdgeKey, edge: Edge) -> None:
        maker = maker_of(self.plan.route(key.step, key.micro_batch), key)
        if maker is None:
            return
        if edge.evicted:
            if edge.hop is not None:
                self.replays[key] = edge.hop
            return
        if key.backward:
            fact: Activation | Gradient = Gradient(step=key.step, micro_batch=key.micro_batch, cut=key.cut)
        else:
            fact = Activation(step=key.step, micro_batch=key.micro_batch, cut=key.cut, non_finite=edge.non_finite)
        self.effects.append(Send(to=maker, fact=fact, payload=edge.payload))

    def evict(self, key: EdgeKey) -> None:
        """The log may not keep this value any longer; if somebody needs it again, its hop is run again."""
        edge = self.log.get(key)
        if edge is not None:
            self.log[key] = Edge(None, edge.non_finite, edge.hop, evicted=True)

    def replayed(self, key: EdgeKey, payload: Payload) -> None:
        """The hop behind an evicted value has been run again, its contribution left out: send the value."""
        edge = self.log.get(key)
        if self.replays.pop(key, None) is not None and edge is not None:
            self._send_edge(key, Edge(payload, edge.non_finite, edge.hop))

    def receive_edge(self, fact: Activation | Gradient, payload: Payload) -> None:
        """Keep it, whoever it is for in this worker's view (rules 3.4, 3.5); a second one changes nothing."""
        key = EdgeKey(fact.step, fact.micro_batch, fact.cut, isinstance(fact, Gradient))
        non_finite = fact.non_finite if isinstance(fact, Activation) else None
        self.inputs.setdefault(key, Edge(payload, non_finite))

    def resend_edges(self, old: Route, new: Route, micro_batch: MicroBatch) -> None:
        """Send what is logged here to the new makers of changed hops (rule 3.6)."""
        for hop in new:
            if hop in old:
                continue
            for cut, backward in ((hop.first, False), (hop.last, True)):
                key = self._edge_key(micro_batch, cut, backward=backward)
                edge = self.log.get(key)
                if edge is not None:
                    self._send_edge(key, edge)

    def _edge_key(self, micro_batch: MicroBatch, cut: Layer, *, backward: bool) -> EdgeKey:
        return EdgeKey(self.step, micro_batch, cut, backward)

    def _hop_key(self, micro_batch: MicroBatch, hop: Hop) -> HopKey:
        return HopKey(self.step, micro_batch, hop.first, hop.last)


def maker_of(route: Route, key: EdgeKey) -> WorkerId | None:
    """Who needs the value at this edge; None where the route is not cut there."""
    for hop in route:
        if (hop.last if key.backward else hop.first) == key.cut:
            return hop.worker
    return None
