"""The whole model's parameters at one version on one worker, block by block from the hosts."""

from collections.abc import Callable

import torch
from torch import Tensor

from elaswave.core.ids import BlockId, WorkerId
from elaswave.core.plan import Plan
from elaswave.core.protocol.worker import StepProtocol
from elaswave.runtime.model import HostedModel

SendRequest = Callable[[WorkerId, int, BlockId], None]
SendBlock = Callable[[WorkerId, int, BlockId, Tensor | None], None]
"""None: the block is at a later version."""


class BlockGather:
    """Asks for blocks and answers those who ask. Answers wait until the block is at the wanted version here.

    A version can be gathered while no later one can be decided without this worker: after the last step, or while it
    holds back its own part of the next one. Has it none, as one that has just joined, the others may move on: `lost`.
    """

    def __init__(
        self, protocol: StepProtocol, model: HostedModel, send_request: SendRequest, send_block: SendBlock
    ) -> None:
        self._protocol = protocol
        self._model = model
        self._send_request = send_request
        self._send_block = send_block
        self._wanted: int | None = None
        self.lost = False
        """Some block has a later version than the wanted one by now, wherever it is hosted."""
        self._parts: dict[BlockId, Tensor] = {}
        self._own: set[BlockId] = set()  # those of the parts that are hosted here
        self._asked: dict[BlockId, WorkerId] = {}
        self._requests: list[tuple[WorkerId, int, BlockId]] = []

    @property
    def wanted(self) -> int | None:
        """The version that is being gathered."""
        return self._wanted

    def want(self, version: int | None) -> None:
        """Begin to gather this version; None: no more of what was wanted."""
        self._wanted, self.lost = version, False
        self._parts, self._asked, self._own = {}, {}, set()

    def ask_again(self, host: WorkerId) -> None:
        """What was asked of this host, or its answer, may be lost."""
        self._asked = {block: asked for block, asked in self._asked.items() if asked != host}

    def requested(self, source: WorkerId, version: int, block: BlockId) -> None:
        """`source` wants a block."""
        self._requests.append((source, version, block))

    def received(self, version: int, block: BlockId, data: Tensor) -> None:
        """A block has come."""
        if version == self._wanted:
            self._parts.setdefault(block, data)

    def gone(self, version: int, block: BlockId) -> None:
        """Whoever was asked for it has a later one."""
        self.lost = self.lost or (version == self._wanted and block not in self._parts)

    def answer(self) -> None:
        """Send what others wait for and is complete here."""
        for request in [request for request in self._requests if self._version_here(request[2]) >= request[1]]:
            self._requests.remove(request)
            source, version, block = request
            is_here = self._version_here(block) == version
            self._send_block(source, version, block, self._model.block(block) if is_here else None)

    def collect(self, plan: Plan) -> dict[BlockId, Tensor] | None:
        """All blocks of the wanted version once they are here, else None; asks whoever hosts them under this plan."""
        if self._wanted is None:
            return None
        shape = self._protocol.job.shape
        for index, block in enumerate(shape.blocks):
            number = BlockId(index)
            if number in self._parts:
                continue
            if not block.elements:
                self._parts[number] = torch.empty(0)
            elif self._version_here(number) == self._wanted:
                self._parts[number] = self._model.block(number)
                self._own.add(number)
            else:
                hosts = {host for layer in block.layers for host in plan.hosts_of_layer.get(layer, ())}
                self.lost = self.lost or (self._version_here(number) > self._wanted and hosts == {self._protocol.me})
                self._ask(number, sorted(hosts - {self._protocol.me}))
        if any(self._version_here(number) != self._wanted for number in self._own):
            self.lost = True  # others have gone on without this worker, and with them what is hosted here
        if self.lost or len(self._parts) < len(shape.blocks):
            return None
        parts, self._parts, self._wanted = self._parts, {}, None
        return parts

    def _ask(self, block: BlockId, hosts: list[WorkerId]) -> None:
        if hosts and self._asked.get(block) not in hosts and self._wanted is not None:
            self._asked[block] = hosts[0]
            self._send_request(hosts[0], self._wanted, block)

    def _version_here(self, block: BlockId) -> int:
        """Lowest version of the block's parameters here; -1 where it is not hosted."""
        if not self._model.hosts_block(block):
            return -1
        shards = self._protocol.job.shape.shards_of_block[block]
        return min(self._protocol.parameters.get(shard, -1) for shard in shards)
