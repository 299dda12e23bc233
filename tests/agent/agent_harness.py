"""A controller for tests, and agents and zygotes as real processes, each ended by the test that started it."""

import asyncio
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import ExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import grpc
from grpc import aio

from elaswave._pb import control_pb2, control_pb2_grpc
from elaswave.core.events import (
    FenceWorker,
    StartWorker,
    WorkerCleared,
    WorkerExited,
    WorkerStarted,
    WorkerSuspected,
)
from elaswave.core.ids import NodeId, WorkerId
from elaswave.wire import (
    Command,
    WorkerEvent,
    decode_supervision,
    decode_worker_event,
    encode_command,
    encode_order,
)

ROOT = Path(__file__).resolve().parent.parent.parent
WORKER = Path(__file__).with_name("worker_script.py")
LIMIT_S = 30.0
TOKEN = "a secret of this test"

Told = WorkerEvent | WorkerStarted | WorkerExited | WorkerSuspected | WorkerCleared
_Event = TypeVar("_Event", bound=Told)


def python_environment(**more: str) -> dict[str, str]:
    path = os.pathsep.join(str(ROOT / folder) for folder in (".", "agent", "controller", "launch"))
    return {**os.environ, "PYTHONPATH": path, **more}


@dataclass(eq=False)
class Attached:
    """One stream of an agent."""

    hello: control_pb2.AgentHello
    outbox: "asyncio.Queue[control_pb2.AttachResponse | None]" = field(default_factory=asyncio.Queue)
    told: list[tuple[float, Told]] = field(default_factory=list)
    beats: list[float] = field(default_factory=list)
    left: bool = False
    ended: bool = False


class Controller(control_pb2_grpc.AgentServiceServicer):
    """Keeps what agents tell and sends what the test wants."""

    def __init__(self) -> None:
        self.streams: list[Attached] = []
        self._changed = asyncio.Condition()
        self.address = ""
        self.server = aio.server()

    async def Attach(self, request_iterator: object, context: aio.ServicerContext) -> None:
        if dict(context.invocation_metadata()).get("elaswave-token") != TOKEN:
            await context.abort(grpc.StatusCode.UNAUTHENTICATED, "wrong token")
        first = await context.read()
        stream = Attached(first.hello)
        self.streams.append(stream)
        sender = asyncio.create_task(self._send(stream, context))
        try:
            await self._receive(stream, context)
        finally:
            sender.cancel()
            stream.ended = True
            await self._notify()

    async def _receive(self, stream: Attached, context: aio.ServicerContext) -> None:
        await self._notify()
        while (message := await context.read()) is not aio.EOF:
            now = time.monotonic()
            match message.WhichOneof("body"):
                case "beat":
                    stream.beats.append(now)
                case "leave":
                    stream.left = True
                case "from_worker":
                    told = message.from_worker
                    event = decode_worker_event(WorkerId(told.worker), told.message, told.received_at)
                    stream.told.append((now, event))
                case _:
                    stream.told.append((now, decode_supervision(message)))
            await self._notify()

    async def _send(self, stream: Attached, context: aio.ServicerContext) -> None:
        while (response := await stream.outbox.get()) is not None:
            await context.write(response)

    async def _notify(self) -> None:
        async with self._changed:
            self._changed.notify_all()

    async def until(self, condition: Callable[[], bool], limit_s: float = LIMIT_S) -> None:
        """Wait for something that agents tell to make `condition` true."""
        async with asyncio.timeout(limit_s), self._changed:
            await self._changed.wait_for(condition)

    def all(self, kind: type[_Event], worker: int | None = None) -> list[_Event]:
        return [
            event
            for stream in self.streams
            for _, event in stream.told
            if isinstance(event, kind) and worker in (None, event.worker)
        ]

    async def one(self, kind: type[_Event], worker: int, limit_s: float = LIMIT_S) -> _Event:
        """The first event of this kind from or about `worker`."""
        await self.until(lambda: bool(self.all(kind, worker)), limit_s)
        return self.all(kind, worker)[0]

    async def attached(self, count: int = 1) -> Attached:
        await self.until(lambda: len(self.streams) >= count)
        return self.streams[count - 1]

    def start_worker(self, stream: Attached, worker: int, *, rank: int | None = None, restart_count: int = 0) -> None:
        order = StartWorker(
            node=NodeId(stream.hello.node),
            worker=WorkerId(worker),
            local_index=worker % 4,
            incarnation=0,
            rank=worker if rank is None else rank,
            world_size=4,
            restart_count=restart_count,
        )
        stream.outbox.put_nowait(encode_order(order))

    def fence(self, stream: Attached, worker: int) -> None:
        stream.outbox.put_nowait(encode_order(FenceWorker(worker=WorkerId(worker), reason="a test wants it")))

    def tell(self, stream: Attached, worker: int, command: Command) -> None:
        message = control_pb2.ToWorker(worker=worker, message=encode_command(command))
        stream.outbox.put_nowait(control_pb2.AttachResponse(to_worker=message))

    def shut_down(self, stream: Attached) -> None:
        stream.outbox.put_nowait(control_pb2.AttachResponse(shutdown=control_pb2.Shutdown(reason="test is over")))


@asynccontextmanager
async def running_controller(port: int = 0) -> AsyncIterator[Controller]:
    controller = Controller()
    server = controller.server
    control_pb2_grpc.add_AgentServiceServicer_to_server(controller, server)
    bound = server.add_insecure_port(f"127.0.0.1:{port}")
    controller.address = f"127.0.0.1:{bound}"
    await server.start()
    try:
        yield controller
    finally:
        await server.stop(0)


class Process:
    """A child of the test, with its pidfd."""

    def __init__(self, process: "subprocess.Popen[bytes]", log: Path) -> None:
        self._process = process
        self.pid = process.pid
        self.pidfd = os.pidfd_open(process.pid)
        self.log = log

    def send(self, number: signal.Signals) -> None:
        signal.pidfd_send_signal(self.pidfd, number)

    def wait(self, limit_s: float = LIMIT_S) -> int:
        return self._process.wait(limit_s)

    async def wait_in_loop(self, limit_s: float = LIMIT_S) -> int:
        """For a wait during which this process has to serve the child."""
        return await asyncio.to_thread(self._process.wait, limit_s)

    def end(self) -> None:
        if self._process.poll() is None:
            self.send(signal.SIGKILL)
            self._process.wait(LIMIT_S)
        os.close(self.pidfd)


@contextmanager
def process(command: Sequence[str], log: Path, **environment: str) -> Iterator[Process]:
    with log.open("ab") as output:
        child = Process(
            subprocess.Popen(
                [sys.executable, "-P", *command],
                env=python_environment(**environment),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
            ),
            log,
        )
    try:
        yield child
    finally:
        child.end()


@dataclass(frozen=True)
class Site:
    """A run folder of one test."""

    folder: Path

    @property
    def logs(self) -> Path:
        return self.folder / "logs"

    @contextmanager
    def agent(
        self,
        controller: str,
        *script: str,
        node: str = "n0",
        zygote: str | None = None,
        flags: Sequence[str] = (),
        launched: bool = True,
        **environment: str,
    ) -> Iterator[Process]:
        token = self.folder / "token"
        token.write_text(TOKEN)
        start = ["--spawn"] if zygote is None else ["--zygote", zygote]
        command = ["-m", "elaswave_agent", "--controller", controller, "--node", node, "--workers", "4", *start]
        command += ["--run-dir", str(self.folder), "--token-file", str(token)]
        command += ["--parent-pid", str(os.getpid())] if launched else []
        command += [*flags, "--", *(script or (str(WORKER), "serve"))]
        with process(command, self.folder / f"{node}.log", **environment) as child:
            yield child

    @contextmanager
    def zygote(self) -> Iterator[tuple[Process, str]]:
        path = str(self.folder / "zygote")
        command = ["-m", "elaswave.runtime.zygote", "--socket", path, "--parent-pid", str(os.getpid())]
        with process(command, self.folder / "zygote.log") as child:
            yield child, path

    def output(self, rank: int, kind: str = "out", node: str = "n0") -> str:
        return (self.logs / "run" / node / f"rank_{rank}.{kind}").read_text()


@contextmanager
def watching(pids: Sequence[int]) -> Iterator[Callable[[float], list[int]]]:
    """Gives a function that waits until these processes have ended and returns those that have not.

    pidfds are opened at once, so that no other process that gets one of the numbers is taken for it.
    """
    with ExitStack() as stack:
        found = {}
        for pid in pids:
            found[os.pidfd_open(pid)] = pid
        for descriptor in found:
            stack.callback(os.close, descriptor)

        def wait(limit_s: float) -> list[int]:
            left = dict(found)
            poll = select.poll()
            for descriptor in left:
                poll.register(descriptor, select.POLLIN)
            deadline = time.monotonic() + limit_s
            while left and (rest := deadline - time.monotonic()) > 0:
                for descriptor, _ in poll.poll(rest * 1000):
                    poll.unregister(descriptor)
                    del left[descriptor]
            return sorted(left.values())

        yield wait
