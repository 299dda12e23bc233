"""The agent's stream to the controller: everything it tells, in order, and the orders it gets.

The stream is opened again, with back-off and jitter, when the controller goes away: training goes on without it. Events
wait meanwhile. On a new stream the hello and what is known of living workers come first; a message that was being sent
when the old stream broke may come twice.
"""

import asyncio
import random
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Final

from grpc import aio

from elaswave.certificates import TlsFiles
from elaswave.control_channel import KEEPALIVE_S
from elaswave.core.ids import NodeId
from elaswave.errors import FaultError
from elaswave_agent.orders import Order
from elaswave_agent.wire import (
    Call,
    Request,
    Response,
    attach,
    decode_response,
    encode_beat,
    encode_leave,
    final_reason,
    open_stream_channel,
)

BEATS_PER_SILENCE: Final = 6
BEAT_PERIODS_S: Final = (0.1, 0.5)
"""Shortest and longest. A beat and its answer cost a controller on a small machine a millisecond of work."""

MAX_WAITING: Final = 200_000
"""Events kept for a controller that is away: about an hour of steps of 8 workers."""

REFUSED_LIMIT_S: Final = 10.0
"""For which a controller that was there may have no process that listens. Its machine answers, so this is no cut."""

_PROBE_LIMIT_S = 2.0
_BACKOFF_FIRST_S = 0.1
_BACKOFF_LAST_S = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamSettings:
    """Where the controller is and who asks. `limit_s`: how long it may be away before the agent gives up.

    refused_limit_s: the same where its machine answers that nobody listens.
    silence_s: how long the connection is kept while nothing is heard. tls: None for plain text.
    """

    controller: str
    node: NodeId
    token: str
    limit_s: float
    refused_limit_s: float = REFUSED_LIMIT_S
    silence_s: float = KEEPALIVE_S
    tls: TlsFiles | None = None


class ControllerStream:
    """`run` keeps the stream open until `leave`; `send` queues. Use from one event loop only.

    `greeting`: first messages of each stream. `on_order`: called for each order, in order; must not block.
    """

    def __init__(
        self,
        settings: StreamSettings,
        greeting: Callable[[bool], list[Request]],
        on_order: Callable[[Order], None],
        note: Callable[[str], None],
    ) -> None:
        self._settings = settings
        self._greeting = greeting
        self._on_order = on_order
        self._note = note
        self._waiting: deque[Request] = deque()
        self._wake = asyncio.Event()
        self._leaving = False
        self._beats = 0
        self._streams = 0
        self._heard_at = 0.0

    def send(self, request: Request) -> None:
        """Queue a message. Raises FaultError where the controller has been away for too much."""
        if len(self._waiting) >= MAX_WAITING:
            raise FaultError(f"{MAX_WAITING} events wait for the controller at {self._settings.controller}: giving up")
        self._waiting.append(request)
        self._wake.set()

    def leave(self) -> None:
        """Send what waits, then Leave; `run` returns after that, or at once where there is no stream."""
        self._leaving = True
        self._wake.set()

    async def run(self) -> None:
        """Keep a stream open. Raises FaultError where the controller refuses, or stays away for `limit_s` seconds."""
        loop = asyncio.get_running_loop()
        self._heard_at = loop.time()
        backoff_s = _BACKOFF_FIRST_S
        while True:
            before = self._heard_at
            reason = await self._run_stream()
            if self._leaving:
                return
            away_s = loop.time() - self._heard_at
            ended = self._streams > 0 and away_s > self._settings.refused_limit_s and await self._nobody_listens()
            if away_s > self._settings.limit_s or ended:
                raise FaultError(
                    f"no controller at {self._settings.controller} for {away_s:.0f} s ({reason}): giving up"
                )
            if self._heard_at > before:
                self._note(f"lost the controller at {self._settings.controller}: {reason}")
                backoff_s = _BACKOFF_FIRST_S
            # Jitter, so that a thousand agents do not come back at the same moment.
            await asyncio.sleep(backoff_s * random.uniform(0.5, 1.0))
            backoff_s = min(2 * backoff_s, _BACKOFF_LAST_S)

    async def _nobody_listens(self) -> bool:
        """The controller's machine refuses connections to its port."""
        host, _, port = self._settings.controller.rpartition(":")
        try:
            async with asyncio.timeout(_PROBE_LIMIT_S):
                _, writer = await asyncio.open_connection(host.removeprefix("[").removesuffix("]"), int(port))
        except ConnectionRefusedError:
            return True
        except OSError:  # also TimeoutError: a cut, then
            return False
        writer.close()
        return False

    async def _run_stream(self) -> str:
        """One stream from hello to its end; returns why it ended."""
        channel = open_stream_channel(self._settings.controller, self._settings.tls, self._settings.silence_s)
        call = attach(channel, self._settings.token)
        tasks = [
            asyncio.create_task(work) for work in (self._write_all(call), self._read_all(call), self._beat_while_open())
        ]
        try:
            # Reading ends last where all is well: the controller closes after our Leave.
            await asyncio.wait(tasks[:2], return_when=asyncio.FIRST_EXCEPTION)
            return await _end_of(call, tasks[:2])
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            call.cancel()
            await channel.close()

    async def _write_all(self, call: Call) -> None:
        for request in self._greeting(self._streams > 0):
            await call.write(request)
        self._streams += 1
        while True:
            while self._waiting:
                await call.write(self._waiting[0])
                self._waiting.popleft()
            if self._leaving:
                await call.write(encode_leave())
                await call.done_writing()
                return
            self._wake.clear()
            await self._wake.wait()

    async def _read_all(self, call: Call) -> None:
        while True:
            response = await call.read()
            if not isinstance(response, Response):  # EOF
                raise _StreamEnded
            self._heard_at = asyncio.get_running_loop().time()
            self._on_order(decode_response(self._settings.node, response))

    async def _beat_while_open(self) -> None:
        period_s = beat_period_s(self._settings.silence_s)
        while True:
            self._beats += 1
            self.send(encode_beat(self._beats))
            await asyncio.sleep(period_s)


def beat_period_s(silence_s: float) -> float:
    """How often to beat for a controller that gives a node up after `silence_s`."""
    shortest_s, longest_s = BEAT_PERIODS_S
    return min(longest_s, max(shortest_s, silence_s / BEATS_PER_SILENCE))


class _StreamEnded(Exception):
    """The controller has ended the stream."""


async def _end_of(call: Call, tasks: "list[asyncio.Task[None]]") -> str:
    """Why the stream ended. Raises FaultError where the controller refuses us, and errors that are not the stream's."""
    for task in tasks:
        if not task.done():
            continue
        error = task.exception()
        if isinstance(error, aio.AioRpcError):
            reason = final_reason(error)
            if reason:
                raise FaultError(reason) from error
            return f"{error.code().name}: {error.details()}"
        if error is not None and not isinstance(error, (_StreamEnded, asyncio.InvalidStateError)):
            raise error
    with suppress(TimeoutError):
        async with asyncio.timeout(1.0):
            return f"stream ended with {(await call.code()).name}: {await call.details()}"
    return "stream ended"
