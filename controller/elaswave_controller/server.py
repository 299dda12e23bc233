"""The two gRPC services: streams of agents, calls of operators."""

import asyncio
import hmac
import socket
import time
import traceback
from collections.abc import AsyncIterator, Iterable
from typing import NoReturn, TypeVar

import grpc
from grpc import aio

from elaswave.control_channel import KEEPALIVE_S, add_port
from elaswave.core.events import AgentAttached, AgentLost, StopRequested, WorkerStarted
from elaswave.core.status import Finished
from elaswave.errors import ConfigError, ProtocolError
from elaswave.wire import decode_injection, encode_status, encode_watch
from elaswave_controller.agents import AgentConnection
from elaswave_controller.options import ControllerOptions
from elaswave_controller.shell import Shell
from elaswave_controller.wire import (
    AgentHello,
    AgentServiceServicer,
    AttachRequest,
    AttachResponse,
    Beat,
    InjectRequest,
    InjectResponse,
    Leave,
    OperatorServiceServicer,
    StatusRequest,
    StatusResponse,
    StopRequest,
    StopResponse,
    WatchRequest,
    WatchResponse,
    add_AgentServiceServicer_to_server,
    add_OperatorServiceServicer_to_server,
    beat_response,
    decode_attach,
    decode_hello,
)

TOKEN_KEY = "elaswave-token"  # metadata of every call
_HELLO_LIMIT_S = 10.0
_SWEEP_INTERVAL_S = 0.1
_MAX_REASON = 1000
_OPTIONS = (
    ("grpc.max_receive_message_length", 64 << 20),
    ("grpc.max_send_message_length", 64 << 20),
    # Keepalive finds cut hosts; beats are the authority for everything else (a stopped process still acknowledges).
    ("grpc.keepalive_time_ms", 1000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_ping_strikes", 0),
    ("grpc.http2.max_pings_without_data", 0),
)

_Request = TypeVar("_Request")
_Response = TypeVar("_Response")
_AgentContext = aio.ServicerContext[AttachRequest, AttachResponse]


class Server:
    """A server that listens. Use `start_server`; `stop` ends it."""

    def __init__(self, server: aio.Server, port: int, sweeper: asyncio.Task[None]) -> None:
        self.port = port
        self._server = server
        self._sweeper = sweeper

    async def stop(self, grace_s: float) -> None:
        """Refuse new calls, and cut those that are left after `grace_s`."""
        self._sweeper.cancel()
        await asyncio.wait([self._sweeper])
        await self._server.stop(grace_s)


async def start_server(options: ControllerOptions, shell: Shell) -> Server:
    """Listen at the host and port of `options`. Raises ConfigError where that is not possible."""
    keepalive = ("grpc.keepalive_timeout_ms", int(1000 * max(options.node_suspect_s, KEEPALIVE_S)))
    server = aio.server(options=(*_OPTIONS, keepalive))
    agents = AgentService(options, shell)
    add_AgentServiceServicer_to_server(agents, server)
    add_OperatorServiceServicer_to_server(OperatorService(options, shell), server)
    host = f"[{options.host}]" if ":" in options.host else options.host
    try:
        port = add_port(server, f"{host}:{options.port}", options.tls)
    except RuntimeError as error:
        raise ConfigError(f"endpoint {host}:{options.port}: cannot listen there; choose another port") from error
    await server.start()
    sweeper = asyncio.create_task(agents.sweep(), name="beat sweep")
    return Server(server, port, sweeper)


class AgentService(AgentServiceServicer):
    """One stream per agent. Its end without Leave, and beats that stay away, are the loss of the node."""

    def __init__(self, options: ControllerOptions, shell: Shell) -> None:
        self._options = options
        self._shell = shell
        self._host = socket.gethostname()

    async def Attach(self, request_iterator: AsyncIterator[AttachRequest], context: _AgentContext) -> None:
        await _check_token(context, self._options.token)
        hello = await self._receive_hello(context)
        connection = AgentConnection(hello, time.monotonic())
        if not self._shell.agents.add(connection):
            await _abort(context, grpc.StatusCode.ALREADY_EXISTS, f"node {hello.node} is attached already")
        self._shell.submit(AgentAttached(node=hello.node, workers=hello.workers))
        tasks: list[asyncio.Task[object]] = [
            asyncio.create_task(self._receive(context, connection), name=f"from {hello.node}"),
            asyncio.create_task(_send(context, connection), name=f"to {hello.node}"),
            asyncio.create_task(connection.cut.wait(), name=f"cut {hello.node}"),
        ]
        evidence = "its stream ended"
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            evidence = _evidence(done) or evidence
        finally:
            # Also on cancellation, which is how gRPC tells that the peer is gone.
            self._lose(connection, evidence)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        if not connection.left:
            await _abort(context, grpc.StatusCode.ABORTED, f"node {hello.node} was given up: {evidence}"[:_MAX_REASON])

    async def sweep(self) -> None:
        """Give up agents whose beats stay away; runs until cancelled."""
        limit = self._options.node_suspect_s
        while True:
            before = time.monotonic()
            await asyncio.sleep(_SWEEP_INTERVAL_S)
            now = time.monotonic()
            # Where this process itself was held up, beats may be waiting to be read: nobody is to blame for that.
            held_up = now - before - _SWEEP_INTERVAL_S
            for connection in self._shell.agents.connections:
                silent = now - connection.last_sign
                if silent - held_up > limit:
                    self._lose(connection, f"no sign of life for {silent:.2f} s (limit {limit:g} s)")
                    connection.cut.set()

    async def _receive_hello(self, context: _AgentContext) -> AgentHello:
        try:
            async with asyncio.timeout(_HELLO_LIMIT_S):
                first: object = await context.read()
            if isinstance(first, AttachRequest):
                return decode_hello(first)
            reason = "the stream ended before hello"
        except TimeoutError:
            reason = f"no hello within {_HELLO_LIMIT_S:g} s"
        except ProtocolError as error:
            reason = str(error)
        await _abort(context, grpc.StatusCode.INVALID_ARGUMENT, reason)

    async def _receive(self, context: _AgentContext, connection: AgentConnection) -> None:
        same_clock = connection.hello.host == self._host
        while True:
            message: object = await context.read()
            if not isinstance(message, AttachRequest):
                return  # aio.EOF
            now = time.monotonic()
            connection.last_sign = now
            told = decode_attach(message, now=now, same_clock=same_clock)
            match told:
                case Beat():
                    connection.send(beat_response(told.sequence))
                case Leave():
                    connection.left = True
                    return
                case _:
                    if isinstance(told, WorkerStarted):
                        self._shell.agents.adopt(told.worker, connection.hello.node)
                    self._shell.submit(told, now)

    def _lose(self, connection: AgentConnection, evidence: str) -> None:
        if self._shell.agents.remove(connection):
            node = connection.hello.node
            now = time.monotonic()
            text = "it left" if connection.left else evidence
            self._shell.submit(AgentLost(node=node, clean=connection.left, evidence=text, noticed_at=now), now)


class OperatorService(OperatorServiceServicer):
    """Calls of the launcher and of the `elaswave` command."""

    def __init__(self, options: ControllerOptions, shell: Shell) -> None:
        self._token = options.token
        self._shell = shell

    async def Status(
        self, request: StatusRequest, context: aio.ServicerContext[StatusRequest, StatusResponse]
    ) -> StatusResponse:
        await _check_token(context, self._token)
        return encode_status(self._shell.status())

    async def Inject(
        self, request: InjectRequest, context: aio.ServicerContext[InjectRequest, InjectResponse]
    ) -> InjectResponse:
        await _check_token(context, self._token)
        try:
            injection = decode_injection(request.injection)
        except ProtocolError as error:
            await _abort(context, grpc.StatusCode.INVALID_ARGUMENT, str(error))
        if not self._shell.inject(injection):
            there = ", ".join(map(str, sorted(self._shell.agents.workers))) or "none"
            await _abort(context, grpc.StatusCode.NOT_FOUND, f"no worker {injection.worker}; there are {there}")
        return InjectResponse()

    async def Stop(self, request: StopRequest, context: aio.ServicerContext[StopRequest, StopResponse]) -> StopResponse:
        await _check_token(context, self._token)
        self._shell.submit(StopRequested(reason=request.reason[:_MAX_REASON] or "an operator asked for it"))
        return StopResponse()

    async def Watch(self, request: WatchRequest, context: aio.ServicerContext[WatchRequest, WatchResponse]) -> None:
        await _check_token(context, self._token)
        watcher = self._shell.watchers.open()
        told = False
        try:
            await context.write(encode_watch(self._shell.status()))
            while not told:
                item = await watcher.next()
                if item is None:
                    await _abort(context, grpc.StatusCode.RESOURCE_EXHAUSTED, "too slow: watch again")
                await context.write(encode_watch(item))
                told = isinstance(item, Finished)
        finally:
            self._shell.watchers.close(watcher, told=told)


def _evidence(done: Iterable[asyncio.Task[object]]) -> str:
    for task in done:
        error = None if task.cancelled() else task.exception()
        if isinstance(error, ProtocolError):
            return f"it broke the protocol: {error}"
        if error is not None:
            # The stream is broken, or this is a bug of ours: either way the node cannot be used, and the log says why.
            traceback.print_exception(error)
            return f"its stream failed: {error!r}"
    return ""


async def _send(context: _AgentContext, connection: AgentConnection) -> None:
    while True:
        await context.write(await connection.outbox.get())


async def _check_token(context: "aio.ServicerContext[_Request, _Response]", token: str) -> None:
    given = dict(context.invocation_metadata() or ()).get(TOKEN_KEY, "")
    text = given if isinstance(given, str) else ""
    if not hmac.compare_digest(text.encode(), token.encode()):
        await _abort(context, grpc.StatusCode.UNAUTHENTICATED, "wrong token: this is another job")


async def _abort(context: "aio.ServicerContext[_Request, _Response]", code: grpc.StatusCode, details: str) -> NoReturn:
    await context.abort(code, details)
