"""The agents that are attached, and the way to their workers."""

import asyncio
from collections.abc import Iterable

from elaswave.core.events import FenceWorker, StartWorker
from elaswave.core.ids import NodeId, WorkerId
from elaswave.wire import Command, encode_order
from elaswave_controller.wire import AgentHello, AttachResponse, command_response, shutdown_response


class AgentConnection:
    """One agent's stream. Messages wait in `outbox` for the task that writes them, in order."""

    def __init__(self, hello: AgentHello, now: float) -> None:
        self.hello = hello
        self.outbox: asyncio.Queue[AttachResponse] = asyncio.Queue()
        self.last_sign = now
        self.left = False
        self.cut = asyncio.Event()
        """Set when the controller gives the agent up; the stream is then aborted."""

    def send(self, message: AttachResponse) -> None:
        """Send after everything before."""
        self.outbox.put_nowait(message)


class AgentRegistry:
    """Attached agents by node, and the node of each worker that was started."""

    def __init__(self) -> None:
        self._connections: dict[NodeId, AgentConnection] = {}
        self._node_of: dict[WorkerId, NodeId] = {}
        self._empty = asyncio.Event()
        self._empty.set()

    def add(self, connection: AgentConnection) -> bool:
        """Attach an agent; False where one with the node's name is attached."""
        if connection.hello.node in self._connections:
            return False
        self._connections[connection.hello.node] = connection
        self._empty.clear()
        return True

    def remove(self, connection: AgentConnection) -> bool:
        """Forget an agent; False where that was done before."""
        if self._connections.get(connection.hello.node) is not connection:
            return False
        del self._connections[connection.hello.node]
        if not self._connections:
            self._empty.set()
        return True

    @property
    def connections(self) -> tuple[AgentConnection, ...]:
        """All attached agents, in order of arrival."""
        return tuple(self._connections.values())

    @property
    def workers(self) -> frozenset[WorkerId]:
        """Workers that were started and are not known to be gone."""
        return frozenset(self._node_of)

    def workers_of(self, node: NodeId) -> frozenset[WorkerId]:
        """Workers started on `node` and not known to be gone."""
        return frozenset(worker for worker, at in self._node_of.items() if at == node)

    def link_host_of(self, node: NodeId) -> str:
        """Where workers of a node accept links; empty where its agent is not attached."""
        connection = self._connections.get(node)
        return "" if connection is None else connection.hello.link_host

    def start(self, effect: StartWorker) -> None:
        """Have a worker started. Nothing happens where its agent is gone: the core is told of that by another event."""
        self._node_of[effect.worker] = effect.node
        self._send(effect.node, encode_order(effect))

    def adopt(self, worker: WorkerId, node: NodeId) -> None:
        """The agent of `node` says that it has this worker, also one that it brought along when it came back."""
        self._node_of[worker] = node

    def fence(self, effect: FenceWorker) -> None:
        """Have a worker killed."""
        node = self._node_of.get(effect.worker)
        if node is not None:
            self._send(node, encode_order(effect))

    def command(self, worker: WorkerId, commands: Iterable[Command]) -> None:
        """Tell a worker something, in order."""
        node = self._node_of.get(worker)
        if node is not None:
            for command in commands:
                self._send(node, command_response(worker, command))

    def forget_worker(self, worker: WorkerId) -> None:
        """The worker is gone for good."""
        self._node_of.pop(worker, None)

    def shutdown(self, reason: str) -> None:
        """Ask all agents to end their workers and leave."""
        for connection in self._connections.values():
            connection.send(shutdown_response(reason))

    async def wait_empty(self, limit_s: float) -> bool:
        """Wait until no agent is attached, at most `limit_s`; whether that came true."""
        try:
            await asyncio.wait_for(self._empty.wait(), limit_s)
        except TimeoutError:
            return False
        return True

    def _send(self, node: NodeId, message: AttachResponse) -> None:
        connection = self._connections.get(node)
        if connection is not None:
            connection.send(message)
