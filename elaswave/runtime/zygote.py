"""The zygote: imports torch once and forks workers for the agents of one machine.

`python -m elaswave.runtime.zygote --socket PATH [--parent-pid N] [--announce]`. One thread, no gRPC, no torch
operation, CUDA not touched: a fork of such a process is a sound worker. Where that does not hold, it answers
Unavailable and ends with exit code 3.

Ownership: the zygote dies with the parent that is named; a resident one has none, and its user ends it. Workers die
with the zygote (kernel), and with the agent that asked for them: when its connection ends, for whatever reason, the
zygote kills and reaps them: a node dies with its agent.
"""

import argparse
import gc
import importlib
import os
import pkgutil
import selectors
import signal
import socket
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType
from typing import NoReturn

from elaswave.errors import ConfigError, FaultError, ProtocolError
from elaswave.lifeline import end_with_parent
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
from elaswave.runtime import bootstrap

EXIT_UNAVAILABLE = 3
"""Exit code where forks of this process would not be sound."""

_PRELOAD = ("numpy", "torch")
_PRELOAD_PACKAGES = ("elaswave.core", "elaswave.comm", "elaswave.runtime")
_ONE_THREAD_VARIABLES = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
_ACCELERATOR_DEVICES = ("/dev/nvidia", "/dev/kfd", "/dev/dri/")
_READ_BYTES = 65536
_BACKLOG = 128


@dataclass(slots=True, eq=False)
class _Agent:
    """A connected agent and the processes that it asked for."""

    connection: socket.socket
    decoder: MessageDecoder = field(default_factory=MessageDecoder)
    children: list["_Child"] = field(default_factory=list)


@dataclass(slots=True, eq=False)
class _Child:
    """A forked process that is not reaped yet."""

    request: StartRequest
    pid: int
    pidfd: int
    agent: _Agent


class Zygote:
    """Serves agents on `listener` until the process is ended."""

    def __init__(self, listener: socket.socket) -> None:
        self._listener = listener
        self._selector = selectors.DefaultSelector()
        self._selector.register(listener, selectors.EVENT_READ)
        self._agents: list[_Agent] = []
        self._children: list[_Child] = []

    def serve(self) -> StartRequest:
        """Returns in a forked child only, with what it shall become; its copies of descriptors are closed."""
        while True:
            for key, _ in self._selector.select():
                match key.data:
                    case _Agent() as agent:
                        request = self._read(agent)
                        if request is not None:
                            return request
                    case _Child() as child:
                        self._reap(child)
                    case _:
                        self._accept()

    def refuse_all(self, reason: str) -> None:
        """Tell every agent that is waiting now that nothing will be started here."""
        while self._accept():
            pass
        for agent in self._agents:
            self._send(agent, Unavailable(reason=reason))

    def close(self) -> None:
        """Close this process's descriptors; the processes that share them are not touched."""
        # No unregister: the epoll set is shared with the parent after a fork.
        self._selector.close()
        self._listener.close()
        for agent in self._agents:
            agent.connection.close()
        for child in self._children:
            os.close(child.pidfd)
        self._agents.clear()
        self._children.clear()

    def _accept(self) -> bool:
        try:
            connection, _ = self._listener.accept()
        except BlockingIOError:
            return False
        connection.setblocking(False)
        agent = _Agent(connection)
        self._agents.append(agent)
        self._selector.register(connection, selectors.EVENT_READ, agent)
        return True

    def _read(self, agent: _Agent) -> StartRequest | None:
        if agent not in self._agents:
            return None  # dropped earlier in the same round
        try:
            data = agent.connection.recv(_READ_BYTES)
            messages = agent.decoder.feed(data)
        except BlockingIOError:
            return None
        except (ConnectionError, ProtocolError) as error:
            self._drop(agent, str(error))
            return None
        if not data:
            self._drop(agent, "")
            return None
        for message in messages:
            if not isinstance(message, StartRequest):
                self._drop(agent, f"an agent sent {type(message).__name__}, expected StartRequest")
                return None
            if self._start(agent, message):
                return message
        return None

    def _start(self, agent: _Agent, request: StartRequest) -> bool:
        """Fork; True in the child."""
        parent = os.getpid()
        try:
            with _sigterm_held():
                pid = os.fork()
        except OSError as error:
            self._send(agent, StartRefused(worker=request.worker, reason=f"fork failed: {error.strerror}"))
            return False
        if pid == 0:
            _begin_child(parent)
            self.close()
            return True
        try:
            pidfd = os.pidfd_open(pid)
        except OSError as error:
            # Not reaped yet, so the pid is still this child's.
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            self._send(agent, StartRefused(worker=request.worker, reason=f"pidfd_open failed: {error.strerror}"))
            return False
        child = _Child(request, pid, pidfd, agent)
        agent.children.append(child)
        self._children.append(child)
        self._selector.register(pidfd, selectors.EVENT_READ, child)
        self._send(agent, Started(worker=request.worker, pid=pid), pidfd)
        return False

    def _reap(self, child: _Child) -> None:
        ended = os.waitid(os.P_PIDFD, child.pidfd, os.WEXITED | os.WNOHANG)
        if ended is None:
            return
        self._selector.unregister(child.pidfd)
        os.close(child.pidfd)
        self._children.remove(child)
        if child not in child.agent.children:
            return
        child.agent.children.remove(child)
        exited = ended.si_code == os.CLD_EXITED
        exit_code, number = (ended.si_status, 0) if exited else (0, ended.si_status)
        self._send(child.agent, WorkerEnded(worker=child.request.worker, exit_code=exit_code, signal=number))

    def _send(self, agent: _Agent, message: Message, descriptor: int | None = None) -> None:
        if agent not in self._agents:
            return
        data = encode(message)
        try:
            if descriptor is None:
                sent = agent.connection.send(data)
            else:
                sent = socket.send_fds(agent.connection, [data], [descriptor])
        except (ConnectionError, BlockingIOError) as error:
            # The buffer takes thousands of these small messages: an agent that leaves them unread is stuck or gone.
            self._drop(agent, f"an agent does not read: {error}")
            return
        if sent != len(data):
            self._drop(agent, "an agent does not read: its socket's buffer is full")

    def _drop(self, agent: _Agent, reason: str) -> None:
        if agent not in self._agents:
            return
        if reason:
            sys.stderr.write(f"elaswave zygote: {reason}; killing its {len(agent.children)} workers\n")
        self._agents.remove(agent)
        self._selector.unregister(agent.connection)
        agent.connection.close()
        for child in agent.children:
            signal.pidfd_send_signal(child.pidfd, signal.SIGKILL)
        agent.children.clear()


@contextmanager
def _sigterm_held() -> Iterator[None]:
    """Have SIGTERM wait: what its handler raises in the hooks of a fork would be lost, and the signal with it."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _begin_child(parent: int) -> None:
    try:
        end_with_parent(parent)
    except FaultError:
        os._exit(1)


def preload() -> None:
    """Import what every worker needs. Raises ImportError."""
    for name in _PRELOAD:
        importlib.import_module(name)
    for package in _PRELOAD_PACKAGES:
        path = importlib.import_module(package).__path__
        for module in pkgutil.walk_packages(path, prefix=f"{package}."):
            if module.name != "elaswave.runtime.zygote" and not module.name.endswith("__main__"):
                importlib.import_module(module.name)


def unsound_reason() -> str:
    """Why a fork of this process would not be a sound worker; empty where it would be."""
    threads = len(os.listdir("/proc/self/task"))
    if threads != 1:
        return f"{threads} threads run after the imports, must be 1: set OMP_NUM_THREADS=1 before the start"
    if "grpc" in sys.modules:
        return "grpc was imported, which must not be carried over a fork"
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        return "CUDA was initialised by an import; it cannot be used after a fork"
    for descriptor in os.listdir("/proc/self/fd"):
        try:
            target = os.readlink(f"/proc/self/fd/{descriptor}")
        except FileNotFoundError:
            continue  # the descriptor of the listing itself
        if target.startswith(_ACCELERATOR_DEVICES):
            return f"an import opened {target}; a device that is open cannot be used after a fork"
    return ""


def listen(path: str) -> socket.socket:
    """Bind and listen, readable by this user only. Raises ConfigError where the path cannot be a socket."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    before = os.umask(0o177)
    try:
        listener.bind(path)
    except OSError as error:
        listener.close()
        raise ConfigError(f"zygote socket {path}: {error}; choose a free path of at most 107 bytes") from error
    finally:
        os.umask(before)
    listener.listen(_BACKLOG)
    listener.setblocking(False)
    return listener


def main(arguments: Sequence[str] | None = None) -> int:
    """Serve until ended; returns the exit code. A forked child becomes a worker in here and does not return."""
    parser = argparse.ArgumentParser(prog="python -m elaswave.runtime.zygote")
    parser.add_argument("--socket", required=True)
    parser.add_argument("--parent-pid", type=int, help="end with this process, which is the parent")
    parser.add_argument("--announce", action="store_true", help="print a line once workers can be forked")
    options = parser.parse_args(arguments)
    if options.parent_pid is not None:
        end_with_parent(options.parent_pid)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for variable in _ONE_THREAD_VARIABLES:
        os.environ[variable] = "1"
    # torch then asks NVML, not the CUDA driver, whether there is a GPU: the driver must not be touched before a fork.
    os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"
    # Agents may connect while torch is being imported; they are served after it.
    zygote = Zygote(listen(options.socket))
    signal.signal(signal.SIGTERM, _end)
    serving = os.getpid()
    try:
        request = _serve(zygote, options.socket if options.announce else "")
    finally:
        if os.getpid() == serving:
            os.unlink(options.socket)
    if request is not None:
        _become_worker(request)
    return EXIT_UNAVAILABLE


def _serve(zygote: Zygote, announced: str) -> StartRequest | None:
    try:
        preload()
        reason = unsound_reason()
    except ImportError as error:
        reason = f"import failed: {error}"
    if reason:
        sys.stderr.write(f"elaswave zygote: cannot fork workers: {reason}\n")
        zygote.refuse_all(reason)
        return None
    # Objects made so far stay shared: without this the first collection in each child would touch all their pages.
    gc.collect()
    gc.freeze()
    if announced:
        sys.stdout.write(f"elaswave zygote: serving at {announced}\n")
        sys.stdout.flush()
    return zygote.serve()


def _become_worker(request: StartRequest) -> NoReturn:
    try:
        bootstrap.take_over(request)
    except (OSError, ConfigError) as error:
        bootstrap.tell_failure("config", f"worker {request.worker} cannot start: {error}", "")
        sys.stderr.write(f"elaswave: worker {request.worker} cannot start: {error}\n")
        bootstrap.end_process(1)
    bootstrap.run_worker(request.program)


def _end(_number: int, _frame: FrameType | None) -> NoReturn:
    raise SystemExit(0)


if __name__ == "__main__":
    sys.exit(main())
