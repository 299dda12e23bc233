"""The worker's end of the Unix socket to its agent.

Frames in both directions: WorkerMessage up, AgentMessage down. A thread of its own reads and finishes what could not be
written at once, so the training thread is never held up by an agent. A worker does not outlive its agent: at the end of
the connection the process ends at once.
"""

import os
import selectors
import socket
import sys
import threading
import traceback
from collections.abc import Callable
from typing import Final, NoReturn

from elaswave.core.events import StopRequested, WorkerFailed
from elaswave.core.ids import WorkerId
from elaswave.core.injection import Injection
from elaswave.core.plan import Plan
from elaswave.core.settings import WorkerSettings
from elaswave.errors import DeadlineExceeded, LinkClosed, ProtocolError
from elaswave.handshake import ACCEPTED, RECEIVED, Role, encode_hello
from elaswave.progress import ProgressWriter
from elaswave.wire import (
    AgentMessage,
    Command,
    FrameDecoder,
    PlanDelta,
    WorkerEvent,
    apply_plan_delta,
    decode_command,
    encode_frame,
    encode_worker_event,
    parse,
)

Delivery = Plan | Injection | StopRequested | WorkerSettings
"""What an agent tells a worker; settings come first, once. Plans come complete, one for each epoch, in order."""

MAX_UNSENT_BYTES: Final = 64 << 20
"""More than this unread by the agent: it is stuck."""

EXIT_AGENT_LOST: Final = 1
_READ_BYTES = 1 << 18


class AgentLink:
    """Connection of `worker` to its agent. `open` connects and starts the thread, `close` ends both.

    `deliver` is called in the link's thread, in order; it must not block, and an error that it raises ends the worker.
    """

    def __init__(self, socket_path: str, worker: WorkerId, deliver: Callable[[Delivery], None]) -> None:
        self._path = socket_path
        self._worker = worker
        self._deliver = deliver
        self._decoder = FrameDecoder()
        self._plan: Plan | None = None
        self._lock = threading.Lock()
        self._unsent = bytearray()
        self._closing = False
        self._socket: socket.socket | None = None
        self._progress: ProgressWriter | None = None
        self._thread: threading.Thread | None = None
        self._wake = -1

    def open(self, limit_s: float = 10.0) -> None:
        """Connect, receive the progress page, start the thread.

        Raises LinkClosed where the agent is not there or refuses, DeadlineExceeded where it does not answer in
        `limit_s` seconds.
        """
        connection, page = _connect(self._path, Role.LINK, self._worker, limit_s)
        if page is None:
            connection.close()
            raise ProtocolError(f"the agent at {self._path} sent no progress page with its answer")
        try:
            self._progress = ProgressWriter.open(page)
        finally:
            os.close(page)
        connection.setblocking(False)
        self._socket = connection
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._thread = threading.Thread(target=self._run, name="elaswave-agent-link", daemon=True)
        self._thread.start()

    @property
    def progress(self) -> ProgressWriter:
        """The progress page, to be written by one thread; after `open`."""
        if self._progress is None:
            raise LinkClosed("the agent link is not open: call open() first")
        return self._progress

    def send(self, event: WorkerEvent) -> None:
        """Tell the agent; from any thread, without blocking.

        Raises LinkClosed before `open`, after `close`, and where the agent has stopped reading.
        """
        frame = encode_frame(encode_worker_event(event))
        with self._lock:
            if self._socket is None or self._closing:
                raise LinkClosed(f"the link to the agent at {self._path} is not open")
            # Written here where possible: waking the thread would cost a switch for every report.
            sent = 0 if self._unsent else _send_some(self._socket, frame)
            if sent == len(frame):
                return
            self._unsent += frame[sent:]
            if len(self._unsent) > MAX_UNSENT_BYTES:
                raise LinkClosed(f"the agent has left {len(self._unsent)} bytes unread, limit {MAX_UNSENT_BYTES}")
        os.eventfd_write(self._wake, 1)

    def close(self, limit_s: float = 5.0) -> None:
        """Send what is left, then end connection and thread; idempotent. Raises DeadlineExceeded for a stuck agent."""
        thread = self._thread
        if thread is None:
            return
        with self._lock:
            self._closing = True
        os.eventfd_write(self._wake, 1)
        thread.join(limit_s)
        if thread.is_alive():
            raise DeadlineExceeded(f"the agent did not read the last messages of worker {self._worker} in {limit_s} s")
        self._thread = None
        os.close(self._wake)
        if self._progress is not None:
            self._progress.close()
            self._progress = None

    # -------------------------------------------------------------- the link's thread

    def _run(self) -> None:
        connection = self._socket
        if connection is None:
            return
        try:
            self._serve(connection)
        except BaseException as error:  # outermost frame of the thread: reports, then ends the worker
            self._fail(error)
        connection.close()

    def _serve(self, connection: socket.socket) -> None:
        """Until closed. An end of the connection that this side did not ask for ends the process."""
        with selectors.DefaultSelector() as selector:
            selector.register(connection, selectors.EVENT_READ)
            selector.register(self._wake, selectors.EVENT_READ)
            while True:
                with self._lock:
                    if self._unsent:
                        sent = _send_some(connection, self._unsent)
                        del self._unsent[:sent]
                    wanted = selectors.EVENT_READ | (selectors.EVENT_WRITE if self._unsent else 0)
                    if self._closing and not self._unsent:
                        self._socket = None
                        return
                selector.modify(connection, wanted)
                for key, events in selector.select():
                    if key.fileobj == self._wake:
                        os.eventfd_read(self._wake)
                    elif events & selectors.EVENT_READ and not self._receive(connection):
                        self._end_without_agent()
                        return

    def _receive(self, connection: socket.socket) -> bool:
        """Deliver what has come; False at the end of the connection."""
        try:
            data = connection.recv(_READ_BYTES)
        except BlockingIOError:
            return True
        except ConnectionError:
            return False
        for body in self._decoder.feed(data):
            self._deliver(self._complete(decode_command(parse(AgentMessage, body))))
        return bool(data)

    def _complete(self, command: Command) -> Delivery:
        if not isinstance(command, PlanDelta):
            return command
        self._plan = apply_plan_delta(self._plan, command)
        return self._plan

    def _end_without_agent(self) -> None:
        """A node counts as dead without its agent, so this worker's work is being done elsewhere: end at once."""
        if self._closing:
            return
        sys.stderr.write(f"elaswave: worker {self._worker} lost its agent at {self._path} and ends\n")
        sys.stderr.flush()
        os._exit(EXIT_AGENT_LOST)

    def _fail(self, error: BaseException) -> NoReturn:
        text = traceback.format_exc()
        sys.stderr.write(text)
        sys.stderr.flush()
        failure = WorkerFailed(
            worker=self._worker, kind="bug", message=f"{type(error).__name__}: {error}", traceback=text
        )
        try:
            report_failure(self._path, failure, limit_s=5.0)
        finally:
            os._exit(1)


def report_failure(socket_path: str, failure: WorkerFailed, limit_s: float) -> None:
    """Tell the agent, over a connection of its own, why this worker ends, and wait until it has it.

    Raises LinkClosed, DeadlineExceeded.
    """
    connection, _ = _connect(socket_path, Role.REPORT, failure.worker, limit_s)
    with connection:
        try:
            connection.sendall(encode_frame(encode_worker_event(failure)))
            answer = connection.recv(1)
        except TimeoutError as error:
            raise DeadlineExceeded(f"the agent at {socket_path} took no report in {limit_s} s") from error
        except ConnectionError as error:
            raise LinkClosed(f"the agent at {socket_path} is gone: {error}") from error
    if answer != RECEIVED:
        raise LinkClosed(f"the agent at {socket_path} ended the connection before it had the report")


def _connect(path: str, role: Role, worker: WorkerId, limit_s: float) -> tuple[socket.socket, int | None]:
    """A connection that the agent accepted, with the descriptor that came with its answer."""
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    connection.settimeout(limit_s)
    try:
        connection.connect(path)
        connection.sendall(encode_hello(role, worker))
        answer, descriptors, _, _ = socket.recv_fds(connection, 1, 1, socket.MSG_CMSG_CLOEXEC)
    except TimeoutError as error:
        connection.close()
        raise DeadlineExceeded(f"the agent at {path} did not answer worker {worker} in {limit_s} s") from error
    except OSError as error:
        connection.close()
        raise LinkClosed(f"worker {worker} cannot reach its agent at {path}: {error}") from error
    if answer != ACCEPTED:
        connection.close()
        raise LinkClosed(f"the agent at {path} refused worker {worker}: it did not start this process as that worker")
    return connection, descriptors[0] if descriptors else None


def _send_some(connection: socket.socket, data: bytes | bytearray) -> int:
    """Bytes that went out at once. A connection that is gone takes everything: the reading side ends the process."""
    try:
        return connection.send(data)
    except BlockingIOError:
        return 0
    except ConnectionError:
        return len(data)
