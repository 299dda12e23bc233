"""After the last step, one worker takes the digest over all parameters, layer by layer, from the hosts."""

import hashlib
from collections.abc import Callable

import torch
from torch import Tensor

from elaswave.core.ids import Layer, WorkerId
from elaswave.core.plan import Plan
from elaswave.core.protocol.worker import StepProtocol
from elaswave.core.parameters import BlockLayout
from elaswave.runtime.description import bytes_of
from elaswave.runtime.model import HostedModel, view_of

SendRequest = Callable[[WorkerId, Layer], None]
SendLayer = Callable[[WorkerId, Layer, Tensor], None]


class FinalGather:
    """Digest of a job's parameters at the last version. The lowest member collects, whoever that is under the newest
    plan; hosts answer once their layer is at the last version."""

    def __init__(
        self,
        protocol: StepProtocol,
        model: HostedModel,
        layout: BlockLayout,
        send_request: SendRequest,
        send_layer: SendLayer,
    ) -> None:
        self._protocol = protocol
        self._model = model
        self._layout = layout
        self._send_request = send_request
        self._send_layer = send_layer
        self._layers = [Layer(layer) for layer in range(protocol.job.shape.layers)]
        self._parts: dict[Layer, Tensor] = {}
        self._asked: dict[Layer, WorkerId] = {}
        self._requests: list[tuple[WorkerId, Layer]] = []
        self._done = False

    def requested(self, source: WorkerId, layer: Layer) -> None:
        """`source` wants a layer; it is sent when it is complete here."""
        self._requests.append((source, layer))

    def received(self, layer: Layer, data: Tensor) -> None:
        """A layer's bytes have come."""
        self._parts.setdefault(layer, data)

    def turn(self, plan: Plan) -> str | None:
        """Go on as far as possible; the digest, once, on the worker that collects."""
        for request in [request for request in self._requests if self._complete(request[1])]:
            self._requests.remove(request)
            self._send_layer(request[0], request[1], self._bytes_of(request[1]))
        if self._done or self._protocol.step < self._protocol.job.steps or min(plan.ids) != self._protocol.me:
            return None
        for layer in self._layers:
            self._fetch(layer, plan)
        if len(self._parts) < len(self._layers):
            return None
        self._done = True
        digest = hashlib.sha256()
        for layer in self._layers:
            digest.update(self._parts.pop(layer).numpy().data)
        return digest.hexdigest()

    def _fetch(self, layer: Layer, plan: Plan) -> None:
        if layer in self._parts:
            return
        hosts = plan.hosts_of_layer.get(layer, ())
        if self._protocol.me in hosts:
            if self._complete(layer):
                self._parts[layer] = self._bytes_of(layer)
        elif hosts and self._asked.get(layer) not in hosts:
            self._asked[layer] = hosts[0]
            self._send_request(hosts[0], layer)

    def _complete(self, layer: Layer) -> bool:
        last = self._protocol.job.steps
        shards = self._protocol.job.shape.shards_of_layer[layer]
        hosted = layer in self._model.layers
        return hosted and all(self._protocol.parameters.get(shard) == last for shard in shards)

    def _bytes_of(self, layer: Layer) -> Tensor:
        """What runtime.digest hashes of this layer: for each parameter its heading, then its values."""
        data = bytearray()
        for name, place in self._layout.of_layer(layer).items():
            data += f"{layer} {name}\n".encode()
            data += bytes_of(view_of(self._model.block(place.block), place))
        return torch.frombuffer(data, dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)
