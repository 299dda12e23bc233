"""The agent's Unix socket, at which its workers connect (elaswave.handshake).

Everything runs in the event loop's callbacks. Frames of one worker keep their order; what is left in a dead worker's
socket is read before its exit is told (`drain`).
"""

import asyncio
import os
import socket
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Final, Protocol

from elaswave.core.ids import WorkerId
from elaswave.errors import ConfigError, ProtocolError
from elaswave.handshake import ACCEPTED, HELLO_BYTES, RECEIVED, Role, decode_hello
from elaswave.wire import FrameDecoder

MAX_UNREAD_BYTES: Final = 64 << 20
"""A worker that leaves this much unread will never catch up."""

_READ_BYTES = 1 << 18
_BACKLOG = 256
_CREDENTIALS = struct.Struct("iII")  # struct ucred: pid, uid, gid


class SocketOwner(Protocol):
    """What connections ask and tell; the supervisor."""

    def admit(self, worker: WorkerId, pid: int) -> int | None:
        """The progress page's descriptor, if the process `pid` is `worker`; None: refuse."""
        ...

    def linked(self, worker: WorkerId, connection: "Connection") -> None:
        """`worker` has opened its link."""
        ...

    def unlinked(self, worker: WorkerId, connection: "Connection") -> None:
        """The link of `worker` has ended."""
        ...

    def frame(self, worker: WorkerId, body: bytes) -> None:
        """`worker` sent a message. Raises ProtocolError where it is none."""
        ...

    def broke_protocol(self, worker: WorkerId, error: ProtocolError) -> None:
        """`worker` sent what it should not have sent; its connection is closed."""
        ...


class Connection:
    """One accepted connection. Use from the event loop only."""

    def __init__(self, accepted: socket.socket, owner: SocketOwner, ended: "Callable[[Connection], None]") -> None:
        self._socket = accepted
        self._owner = owner
        self._ended = ended
        self._hello = b""
        self._role: Role | None = None
        self._decoder = FrameDecoder()
        self._unsent = bytearray()
        self.worker: WorkerId | None = None
        """Set once the hello is accepted."""

    @property
    def is_open(self) -> bool:
        return self._socket.fileno() >= 0

    def start(self) -> None:
        """Watch the socket."""
        self._socket.setblocking(False)
        asyncio.get_running_loop().add_reader(self._socket, self.read)

    def send(self, frame: bytes) -> bool:
        """Send, or keep until the worker reads. False where it has left MAX_UNREAD_BYTES unread."""
        if not self._unsent:
            frame = frame[self._write(frame) :]
        if frame and self.is_open:
            if not self._unsent:
                asyncio.get_running_loop().add_writer(self._socket, self._flush)
            self._unsent += frame
        return len(self._unsent) <= MAX_UNREAD_BYTES

    def read(self) -> bool:
        """Take what has come; False where nothing more will, or nothing is there now."""
        try:
            data = self._socket.recv(_READ_BYTES) if self.is_open else b""
        except BlockingIOError:
            return False
        except ConnectionError:
            data = b""
        if not data:
            self.close()
            return False
        try:
            self._take(data)
        except ProtocolError as error:
            if self.worker is not None:
                self._owner.broke_protocol(self.worker, error)
            self.close()
            return False
        return True

    def drain(self) -> None:
        """Take all that has come so far."""
        while self.read():
            pass

    def close(self) -> None:
        """End the connection; idempotent."""
        if not self.is_open:
            return
        loop = asyncio.get_running_loop()
        loop.remove_reader(self._socket)
        loop.remove_writer(self._socket)
        self._socket.close()
        self._ended(self)
        if self.worker is not None and self._role is Role.LINK:
            self._owner.unlinked(self.worker, self)

    def _take(self, data: bytes) -> None:
        if self._role is None:
            missing = HELLO_BYTES - len(self._hello)
            self._hello += data[:missing]
            data = data[missing:]
            if len(self._hello) == HELLO_BYTES:
                self._greet()
        if self.worker is None:
            return
        for body in self._decoder.feed(data):
            self._owner.frame(self.worker, body)
            if self._role is Role.REPORT:
                self._write(RECEIVED)

    def _greet(self) -> None:
        self._role, worker = decode_hello(self._hello)
        pid, uid, _ = _CREDENTIALS.unpack(
            self._socket.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
        )
        page = self._owner.admit(worker, pid) if uid == os.getuid() else None
        if page is None:
            raise ProtocolError(f"process {pid} of user {uid} is not worker {worker}")
        self.worker = worker
        try:
            socket.send_fds(self._socket, [ACCEPTED], [page] if self._role is Role.LINK else [])
        except ConnectionError:
            return  # it died meanwhile; what it has sent still counts
        if self._role is Role.LINK:
            self._owner.linked(worker, self)

    def _write(self, data: bytes | bytearray) -> int:
        try:
            return self._socket.send(data) if self.is_open else len(data)
        except BlockingIOError:
            return 0
        except ConnectionError:
            return len(data)  # the reading side sees the end of the connection

    def _flush(self) -> None:
        del self._unsent[: self._write(self._unsent)]
        if not self._unsent:
            asyncio.get_running_loop().remove_writer(self._socket)


class WorkerSockets:
    """Listens at `path`; `open` and `close` in the event loop."""

    def __init__(self, path: str, owner: SocketOwner) -> None:
        self._path = path
        self._owner = owner
        self._listener: socket.socket | None = None
        self._connections: set[Connection] = set()

    def open(self) -> None:
        """Bind and listen, for this user only. Raises ConfigError where the path cannot be bound."""
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        before = os.umask(0o177)
        try:
            listener.bind(self._path)
        except OSError as error:
            listener.close()
            raise ConfigError(f"agent socket {self._path}: {error}; use another --node or --run-dir") from error
        finally:
            os.umask(before)
        listener.listen(_BACKLOG)
        listener.setblocking(False)
        self._listener = listener
        asyncio.get_running_loop().add_reader(listener, self._accept_all)

    def close(self) -> None:
        """End all connections and remove the socket; idempotent."""
        if self._listener is None:
            return
        asyncio.get_running_loop().remove_reader(self._listener)
        self._listener.close()
        self._listener = None
        for connection in list(self._connections):
            connection.close()
        Path(self._path).unlink(missing_ok=True)

    def _accept_all(self) -> None:
        while self._listener is not None:
            try:
                accepted, _ = self._listener.accept()
            except (BlockingIOError, ConnectionAbortedError):
                return
            connection = Connection(accepted, self._owner, self._connections.discard)
            self._connections.add(connection)
            connection.start()
