"""Ways to start a worker process, behind one interface: fork from the zygote, or spawn."""

import asyncio
import os
import signal
import socket
import subprocess
import sys
from collections import deque
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Final, Protocol

from elaswave.core.ids import WorkerId
from elaswave.errors import FaultError, ProtocolError
from elaswave.process_start import (
    Message,
    MessageDecoder,
    Started,
    StartRefused,
    StartRequest,
    Unavailable,
    WorkerEnded,
    encode,
)

CONNECT_LIMIT_S: Final = 10.0
"""The zygote makes its socket at once, before it imports torch."""

FORK_LIMIT_S: Final = 120.0
"""A first start waits for the zygote's import of torch, from a cold disk and beside other nodes'."""

TIE_LIMIT_S: Final = 60.0
"""A fresh interpreter imports a little of ours before it ties itself: milliseconds, but from a cold disk."""

_RETRY_S = 0.02
_READ_BYTES = 65536
_MAX_DESCRIPTORS = 16


class StarterUnavailable(FaultError):
    """This way of starting does not work here, or no longer."""


class StartFailed(FaultError):
    """This one process could not be started."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ExitStatus:
    """How a process ended: killed by `signal` where that is above 0, else with `exit_code`."""

    exit_code: int = 0
    signal: int = 0


class StartedProcess(Protocol):
    """A worker process; whoever holds this owns `pidfd`."""

    @property
    def pid(self) -> int: ...

    @property
    def pidfd(self) -> int: ...

    async def status(self) -> ExitStatus:
        """How it ended; to be called after `pidfd` has become readable, then due at once."""
        ...


class ProcessStarter(Protocol):
    """Starts worker processes which the kernel ends with this agent, however it ends."""

    async def start(self, request: StartRequest) -> StartedProcess:
        """Raises StartFailed for this process, StarterUnavailable for all."""
        ...

    def close(self) -> None:
        """Free what the starter holds; idempotent."""
        ...


# ------------------------------------------------------------------ spawn


@dataclass(frozen=True, slots=True)
class _Spawned:
    process: "subprocess.Popen[bytes]"
    pidfd: int

    @property
    def pid(self) -> int:
        return self.process.pid

    async def status(self) -> ExitStatus:
        code = self.process.poll()
        if code is None:
            raise StartFailed(f"process {self.pid} has not ended")
        return ExitStatus(exit_code=code) if code >= 0 else ExitStatus(signal=-code)


class SpawnStarter:
    """A fresh interpreter for each worker: slow to start, needs nothing."""

    async def start(self, request: StartRequest) -> StartedProcess:
        """Returns when the child has tied itself to this process (elaswave.runtime.bootstrap), or has ended.

        Before, nobody hears of it: stopped then, it would outlive an agent that is killed.
        """
        told, tells = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            process = self._spawn(request, tells)
        except OSError as error:
            os.close(told)
            raise StartFailed(f"worker {request.worker} cannot be started: {error}") from error
        finally:
            os.close(tells)
        try:
            async with asyncio.timeout(TIE_LIMIT_S):
                await _readable(told)
            # Our own child and not waited for: the pid cannot be another's.
            return _Spawned(process, os.pidfd_open(process.pid))
        except BaseException as error:
            process.kill()
            process.wait()
            if isinstance(error, OSError):  # a timeout, too
                raise StartFailed(f"worker {request.worker} did not start in {TIE_LIMIT_S:g} s: {error}") from error
            raise
        finally:
            os.close(told)

    def _spawn(self, request: StartRequest, tells: int) -> "subprocess.Popen[bytes]":
        program = request.program
        command = [sys.executable, "-P", "-m", "elaswave.runtime.bootstrap", "--parent-pid", str(os.getpid())]
        command += ["--tied-fd", str(tells)]
        command += ["--module"] if program.is_module else []
        command += ["--", program.target, *program.arguments]
        with ExitStack() as files:
            return subprocess.Popen(
                command,
                env=dict(request.environment),
                cwd=request.working_directory,
                stdin=subprocess.DEVNULL,
                stdout=files.enter_context(open(request.stdout, "ab")),
                stderr=files.enter_context(open(request.stderr, "ab")),
                pass_fds=(tells,),
            )

    def close(self) -> None:
        """Nothing is held."""


async def _readable(descriptor: int) -> None:
    """Until something can be read there, or its other end is closed."""
    loop = asyncio.get_running_loop()
    ready: asyncio.Future[None] = loop.create_future()

    def tell() -> None:
        loop.remove_reader(descriptor)
        ready.set_result(None)

    loop.add_reader(descriptor, tell)
    try:
        await ready
    finally:
        loop.remove_reader(descriptor)


# ------------------------------------------------------------------ fork


@dataclass(slots=True, eq=False)
class _Forked:
    pid: int
    pidfd: int
    ended: "asyncio.Future[ExitStatus]"

    async def status(self) -> ExitStatus:
        return await self.ended


@dataclass(slots=True)
class _Zygote:
    """An open connection to the zygote."""

    connection: socket.socket
    decoder: MessageDecoder = field(default_factory=MessageDecoder)
    descriptors: deque[int] = field(default_factory=deque)
    sending: asyncio.Lock = field(default_factory=asyncio.Lock)


class ForkStarter:
    """Asks the zygote at `socket_path`; connects at the first start.

    The connection is also a lifeline: when it ends, the zygote kills the workers that were asked for over it.
    """

    def __init__(self, socket_path: str) -> None:
        self._path = socket_path
        self._zygote: _Zygote | None = None
        self._gone = ""
        self._starting: dict[WorkerId, asyncio.Future[_Forked]] = {}
        self._running: dict[WorkerId, _Forked] = {}
        self._connecting = asyncio.Lock()

    async def start(self, request: StartRequest) -> StartedProcess:
        """Raises StartFailed also where the zygote does not answer in FORK_LIMIT_S seconds."""
        async with self._connecting:
            zygote = self._zygote or await self._connect()
        answer: asyncio.Future[_Forked] = asyncio.get_running_loop().create_future()
        self._starting[request.worker] = answer
        try:
            async with asyncio.timeout(FORK_LIMIT_S):
                async with zygote.sending:
                    await asyncio.get_running_loop().sock_sendall(zygote.connection, encode(request))
                return await answer
        except TimeoutError as error:
            raise StartFailed(f"the zygote did not start worker {request.worker} in {FORK_LIMIT_S} s") from error
        except ConnectionError as error:
            self._receive(zygote)  # it may have said why before it ended
            raise StarterUnavailable(self._gone or f"the zygote at {self._path} is gone: {error}") from error
        finally:
            self._starting.pop(request.worker, None)

    def close(self) -> None:
        """End the connection: the zygote kills what still runs."""
        self._lose("closed")

    async def _connect(self) -> _Zygote:
        if self._gone:
            raise StarterUnavailable(self._gone)
        loop = asyncio.get_running_loop()
        deadline = loop.time() + CONNECT_LIMIT_S
        while True:
            connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            connection.setblocking(False)
            try:
                await loop.sock_connect(connection, self._path)
                break
            except (FileNotFoundError, ConnectionRefusedError) as error:
                connection.close()
                if loop.time() > deadline:
                    raise StarterUnavailable(
                        f"no zygote answers at {self._path} after {CONNECT_LIMIT_S} s: {error}"
                    ) from error
            # It is being started at the same time: its socket is due any moment.
            await asyncio.sleep(_RETRY_S)
        self._zygote = _Zygote(connection)
        loop.add_reader(connection, self._receive, self._zygote)
        return self._zygote

    def _receive(self, zygote: _Zygote) -> None:
        try:
            data, descriptors, _, _ = socket.recv_fds(
                zygote.connection, _READ_BYTES, _MAX_DESCRIPTORS, socket.MSG_CMSG_CLOEXEC
            )
        except BlockingIOError:
            return
        except ConnectionError as error:
            self._lose(str(error))
            return
        zygote.descriptors.extend(descriptors)
        if not data:
            self._lose("it has ended")
            return
        try:
            for message in zygote.decoder.feed(data):
                self._take(message, zygote)
        except ProtocolError as error:
            self._lose(str(error))

    def _take(self, message: Message, zygote: _Zygote) -> None:
        match message:
            case Started():
                self._take_started(message, zygote)
            case StartRefused():
                waiting = self._starting.get(message.worker)
                if waiting is not None and not waiting.done():
                    waiting.set_exception(StartFailed(message.reason))
            case WorkerEnded():
                process = self._running.pop(message.worker, None)
                if process is not None and not process.ended.done():
                    process.ended.set_result(ExitStatus(exit_code=message.exit_code, signal=message.signal))
            case Unavailable():
                self._lose(message.reason)
            case _:
                raise ProtocolError(f"the zygote sent {type(message).__name__}, which only agents send")

    def _take_started(self, message: Started, zygote: _Zygote) -> None:
        if not zygote.descriptors:
            raise ProtocolError(f"the zygote sent no pidfd with the start of worker {message.worker}")
        pidfd = zygote.descriptors.popleft()
        process = _Forked(message.pid, pidfd, asyncio.get_running_loop().create_future())
        self._running[message.worker] = process
        waiting = self._starting.get(message.worker)
        if waiting is None or waiting.done():
            # Its start was given up: nobody will watch it.
            signal.pidfd_send_signal(pidfd, signal.SIGKILL)
            os.close(pidfd)
            return
        waiting.set_result(process)

    def _lose(self, reason: str) -> None:
        zygote, self._zygote = self._zygote, None
        if zygote is None:
            return
        self._gone = f"the zygote at {self._path} cannot be used: {reason}"
        asyncio.get_running_loop().remove_reader(zygote.connection)
        zygote.connection.close()
        for descriptor in zygote.descriptors:
            os.close(descriptor)
        for waiting in self._starting.values():
            if not waiting.done():
                waiting.set_exception(StarterUnavailable(self._gone))
        for process in self._running.values():
            if not process.ended.done():
                # The zygote took its workers along: the kernel kills them when it ends (elaswave.lifeline).
                process.ended.set_result(ExitStatus(signal=signal.SIGKILL))
        self._running.clear()


class FallbackStarter:
    """Uses `preferred` until it turns out unavailable, from then on `other`; `note` is told why, once."""

    def __init__(self, preferred: ProcessStarter, other: ProcessStarter, note: Callable[[str], None]) -> None:
        self._preferred: ProcessStarter | None = preferred
        self._other = other
        self._note = note
        self._closed = False

    async def start(self, request: StartRequest) -> StartedProcess:
        """As the starter in use."""
        preferred = self._preferred
        if preferred is not None:
            try:
                return await preferred.start(request)
            except StarterUnavailable as error:
                if self._closed:
                    raise
                if self._preferred is not None:
                    self._note(f"{error}; workers are spawned instead")
                    self._preferred = None
                    preferred.close()
        return await self._other.start(request)

    def close(self) -> None:
        """Close both; starts under way fail."""
        self._closed = True
        if self._preferred is not None:
            self._preferred.close()
        self._other.close()
