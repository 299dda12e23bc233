"""The controller's shell over real gRPC, with a scripted core and agents that the test plays."""

import asyncio
import socket
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeVar

from grpc import aio

from elaswave._pb import control_pb2 as pb
from elaswave._pb.control_pb2_grpc import AgentServiceStub, OperatorServiceStub
from elaswave.core.config import ControllerConfig
from elaswave.core.events import AgentAttached, Effect, Event, JobEnded, PersistPlan, SendPlans, StartWorker, Tick
from elaswave.core.ids import Epoch, Layer, NodeId, Step, WorkerId
from elaswave.core.plan import Group, Hop, Member, Plan, RouteTable
from elaswave.core.status import JobStatus, WorkerStatus
from elaswave_controller.options import ControllerOptions
from elaswave_controller.server import start_server
from elaswave_controller.shell import Shell
from elaswave_controller.store import Store
from elaswave_controller.store.memory import open_memory_store

LIMIT_S = 10.0
TOKEN = "t" * 32
Answer = Callable[[Event], Sequence[Effect]]
Result = TypeVar("Result")


@dataclass
class ScriptedCore:
    """Notes every event and answers with what the test says."""

    answer: Answer = lambda event: ()
    config: ControllerConfig = field(default_factory=lambda: ControllerConfig(dp=1, pp=1))
    deadline: float | None = None
    seen: list[tuple[Event, float]] = field(default_factory=list)
    changed: asyncio.Event = field(default_factory=asyncio.Event)

    def handle(self, event: Event, now: float) -> list[Effect]:
        if isinstance(event, Tick):
            self.deadline = None
        self.seen.append((event, now))
        self.changed.set()
        return list(self.answer(event))

    def next_deadline(self) -> float | None:
        return self.deadline

    def status(self) -> JobStatus:
        worker = WorkerStatus(worker=WorkerId(0), pid=0, node=NodeId("a"), local_index=0, incarnation=0, state="member")
        return JobStatus(job="", epoch=Epoch(7), step=Step(3), steps=9, state="training", workers=(worker,))

    async def wait_for(self, kind: type, count: int = 1) -> list[Event]:
        """The events of a kind, as soon as there are `count`."""
        async with asyncio.timeout(LIMIT_S):
            while len(found := [event for event, _ in self.seen if isinstance(event, kind)]) < count:
                self.changed.clear()
                await self.changed.wait()
        return found


class FakeAgent:
    """An agent's stream, played by the test."""

    def __init__(self, address: str, token: str = TOKEN) -> None:
        self._channel = aio.insecure_channel(address, options=(("grpc.use_local_subchannel_pool", 1),))
        self.call = AgentServiceStub(self._channel).Attach(metadata=(("elaswave-token", token),))

    async def hello(
        self, node: str = "a", workers: int = 2, host: str | None = None, link_host: str = "127.0.0.1"
    ) -> None:
        host = socket.gethostname() if host is None else host
        await self.send(hello=pb.AgentHello(node=node, workers=workers, pid=1, host=host, link_host=link_host))

    async def send(self, **body: object) -> None:
        await self.call.write(pb.AttachRequest(**body))  # type: ignore[arg-type]

    async def receive(self) -> pb.AttachResponse:
        async with asyncio.timeout(LIMIT_S):
            message = await self.call.read()
        assert isinstance(message, pb.AttachResponse), "the stream has ended"
        return message

    async def receive_kinds(self, count: int) -> list[str]:
        return [describe(await self.receive()) for _ in range(count)]

    async def leave(self) -> None:
        await self.send(leave=pb.Leave())
        await self.call.done_writing()

    async def close(self) -> None:
        await self._channel.close()


def describe(message: pb.AttachResponse) -> str:
    """`start 0`, `settings 0`, `plan 3 to 0`, `fence 0`, `injection to 0`, `beat 5`, `shutdown`."""
    kind = message.WhichOneof("body")
    if kind == "to_worker":
        body = message.to_worker.message
        worker = message.to_worker.worker
        if body.WhichOneof("body") == "plan":
            return f"plan {body.plan.epoch} to {worker}"
        return f"{body.WhichOneof('body')} to {worker}"
    if kind == "start":
        return f"start {message.start.worker}"
    if kind == "fence":
        return f"fence {message.fence.worker}"
    if kind == "beat":
        return f"beat {message.beat.sequence}"
    return str(kind)


@dataclass
class Running:
    """A controller that listens."""

    shell: Shell
    core: ScriptedCore
    cores: list[ScriptedCore]
    made: asyncio.Event
    address: str
    store: Store
    ended: "asyncio.Task[JobEnded]"
    agents: list[FakeAgent] = field(default_factory=list)
    channel: aio.Channel | None = None

    async def agent(self, node: str = "a", workers: int = 2, **more: str) -> FakeAgent:
        """An agent that has said hello."""
        agent = FakeAgent(self.address)
        self.agents.append(agent)
        await agent.hello(node, workers, **more)
        return agent

    async def core_number(self, number: int) -> ScriptedCore:
        """The core of a later generation, as soon as it is made."""
        async with asyncio.timeout(LIMIT_S):
            while len(self.cores) <= number:
                self.made.clear()
                await self.made.wait()
        return self.cores[number]

    @property
    def operator(self) -> OperatorServiceStub:
        if self.channel is None:
            self.channel = aio.insecure_channel(self.address)
        return OperatorServiceStub(self.channel)


@asynccontextmanager
async def controller(
    answer: Answer = lambda event: (), store: Store | None = None, **options: object
) -> AsyncIterator[Running]:
    """A controller on a free port; everything has ended when the block is left."""
    chosen = ControllerOptions(
        job="job", config=ControllerConfig(dp=1, pp=1), token=TOKEN, run_dir=Path("/run/x"), node_suspect_s=5.0
    )
    chosen = replace(chosen, **options)  # type: ignore[arg-type]
    cores: list[ScriptedCore] = []

    made = asyncio.Event()

    def make_core(config: ControllerConfig) -> ScriptedCore:
        cores.append(ScriptedCore(answer, config))
        made.set()
        return cores[-1]

    store = store or open_memory_store(None)
    shell = Shell(chosen, make_core, store)
    server = await start_server(chosen, shell)
    ended = asyncio.create_task(shell.run())
    running = Running(shell, cores[0], cores, made, f"127.0.0.1:{server.port}", store, ended)
    try:
        async with asyncio.timeout(3 * LIMIT_S):
            yield running
    finally:
        for agent in running.agents:
            await agent.close()
        if running.channel is not None:
            await running.channel.close()
        await server.stop(0.1)
        ended.cancel()
        await asyncio.gather(ended, return_exceptions=True)
        await store.close()


def metadata() -> tuple[tuple[str, str]]:
    return (("elaswave-token", TOKEN),)


def start(worker: int, node: str = "a") -> StartWorker:
    return StartWorker(
        node=NodeId(node), worker=WorkerId(worker), local_index=worker, incarnation=0, rank=worker, world_size=2,
        restart_count=0,
    )  # fmt: skip


def plan(epoch: int, workers: Sequence[int] = (0,), reason: str = "test") -> Plan:
    """A plan with one layer and one micro-batch per worker."""
    members = tuple(
        Member(worker=WorkerId(worker), node=NodeId("a"), local_index=worker, incarnation=0, address="tcp:h:1")
        for worker in workers
    )
    routes = tuple(
        (Hop(worker=WorkerId(worker), epoch=Epoch(epoch), first=Layer(0), last=Layer(1)),) for worker in workers
    )
    return Plan(
        epoch=Epoch(epoch),
        reason=reason,
        members=members,
        hosting={WorkerId(worker): (Layer(0),) for worker in workers},
        tables=(RouteTable(first_step=Step(0), routes=routes),),
        groups=(Group(owner=WorkerId(workers[0])),),
    )


def persist(epoch: int, previous: int = 0) -> PersistPlan:
    return PersistPlan(plan=plan(epoch), previous=plan(previous) if previous else None)


def exited(worker: int) -> pb.WorkerExited:
    now = time.monotonic()
    return pb.WorkerExited(worker=worker, signal=9, noticed_at=now, last_alive_at=now - 0.5)


LOCAL_START = (start(0), start(1))


def run(work: Coroutine[object, object, Result]) -> Result:
    """Run the body of a test."""
    return asyncio.run(work)


def send(worker: int, epoch: int) -> SendPlans:
    return SendPlans(worker=WorkerId(worker), first_epoch=Epoch(epoch))


def starting(event: Event) -> Sequence[Effect]:
    """Two workers on each agent that comes."""
    return LOCAL_START if isinstance(event, AgentAttached) else ()
