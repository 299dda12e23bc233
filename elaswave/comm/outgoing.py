"""Outgoing: the connection to one peer that this worker dials, and dials again while frames wait for it."""

import errno
import os
import select
import socket
import ssl
import time
from enum import Enum
from typing import Protocol

from elaswave.comm import hello
from elaswave.comm.addresses import LinkAddress, LinkOptions, UnixAddress, open_socket, process_behind
from elaswave.comm.frames import HEADER_BYTES, encode_goodbye
from elaswave.comm.incoming import Ending, say
from elaswave.comm.loop import Loop
from elaswave.comm.sending import QUIET, WRITABLE, SendQueue
from elaswave.comm.tls import TlsContexts, TlsRefused, TlsSocket, explain
from elaswave.core.ids import WorkerId
from elaswave.errors import LinkClosed, PeerError, ProtocolError


class OutgoingOwner(Protocol):
    """Who keeps the table of peers."""

    def outgoing_up(self, outgoing: "Outgoing") -> None:
        """Its peer has welcomed us."""

    def outgoing_ended(self, outgoing: "Outgoing", ending: Ending) -> None:
        """Its connection, which was up, is broken; frames still wait until `reset`."""

    def dial_failed(self, outgoing: "Outgoing", error: PeerError) -> None:
        """A dial came to nothing. LinkClosed: frames wait, it dials again. ProtocolError: frames were dropped."""

    def drained(self) -> None:
        """A queue became empty."""


class _Stage(Enum):
    IDLE = "idle"
    SECURING = "connects, and shakes hands as TLS"
    CHALLENGED = "awaits the challenge"
    GREETED = "awaits the welcome"
    UP = "up"
    CLOSED = "closed"


_UNDER_WAY = (_Stage.SECURING, _Stage.CHALLENGED, _Stage.GREETED)


class Outgoing:
    """Dial, hello, hang-up watch and redial for one peer. All but `queue` is for the I/O thread."""

    def __init__(
        self,
        peer: WorkerId,
        address: LinkAddress,
        *,
        me: WorkerId,
        token: bytes,
        loop: Loop,
        owner: OutgoingOwner,
        options: LinkOptions,
        tls: TlsContexts | None = None,
    ) -> None:
        self.peer = peer
        self._address = address
        self.queue = SendQueue(
            f"worker {peer}",
            direct_bytes=options.direct_bytes,
            limit_bytes=options.queue_limit_bytes,
            rearm=loop.rearm,
            checksums=options.checksums,
        )
        self._me = me
        self._token = token
        self._loop = loop
        self._owner = owner
        self._options = options
        self._tls = tls
        self._stage = _Stage.IDLE
        self._socket: socket.socket | None = None
        self._heard = b""
        self._ends: hello.Ends | None = None
        self._dials = 0  # tells the timers of one dial from those of the next
        self._failures = 0  # in a row

    @property
    def is_on_this_host(self) -> bool:
        """Whether the peer listens at a Unix socket."""
        return isinstance(self._address, UnixAddress)

    @property
    def peer_process(self) -> int:
        """Of a link that is up, on this host: the peer's process."""
        if self._socket is None:
            return 0
        return process_behind(self._socket)

    @property
    def is_closed(self) -> bool:
        """Whether it was closed for good."""
        return self._stage is _Stage.CLOSED

    @property
    def is_up(self) -> bool:
        """Whether the peer has welcomed us and has not hung up."""
        return self._stage is _Stage.UP

    def dial(self) -> None:
        """Connect unless that is done or under way."""
        if self._stage is not _Stage.IDLE:
            return
        self._dials += 1
        try:
            opened = open_socket(self._address, self._options)
        except OSError as error:
            self._failed(LinkClosed(f"cannot open a socket for worker {self.peer}: {error.strerror}"))
            return
        self._socket = opened
        secures = self._tls is not None and not self.is_on_this_host
        self._stage = _Stage.SECURING if secures else _Stage.CHALLENGED
        self._heard = b""
        code = opened.connect_ex(self._address.target)
        if code not in (0, errno.EINPROGRESS):
            self._failed(self._unreachable(code))
            return
        # Without TLS no EPOLLOUT: a connection that comes about brings the challenge, one that does not an error.
        self._loop.watch(opened, self, WRITABLE if secures else QUIET)
        dial = self._dials
        self._loop.call_at(time.monotonic() + self._options.hello_limit_s, lambda: self._give_up(dial))

    def _unreachable(self, code: int | None) -> LinkClosed:
        cause = os.strerror(code) if code else "it hung up during the hello"
        return LinkClosed(f"cannot reach worker {self.peer} at {self._address.target!r}: {cause}")

    def _give_up(self, dial: int) -> None:
        if dial == self._dials and self._stage in _UNDER_WAY:
            limit = self._options.hello_limit_s
            untold = self._stage is _Stage.CHALLENGED and not self.is_on_this_host and self._tls is None
            hint = ": perhaps it wants TLS (LinkOptions.tls)" if untold else ""
            self._failed(
                LinkClosed(f"worker {self.peer} at {self._address.target!r} gave no answer within {limit} s{hint}")
            )

    def on_event(self, events: int) -> None:
        """Go on with the hello; once up, write what waits and watch for the hang-up."""
        if self._socket is None:
            return
        if self._stage is _Stage.SECURING:
            self._secure(self._socket)
            return
        if self._stage is not _Stage.UP:
            self._greet(self._socket)
            return
        if events & ~select.EPOLLOUT:
            ending = self._listen(self._socket)
            if ending is not None:
                self._owner.outgoing_ended(self, ending)
                return
        if events & select.EPOLLOUT:
            self._write()

    def _secure(self, opened: socket.socket) -> None:
        """Connected, or failed to; then the handshake. A refusal of our certificate comes later, with the challenge."""
        code = opened.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if code:
            self._failed(self._unreachable(code))
            return
        try:
            if not isinstance(opened, TlsSocket) and self._tls is not None:
                opened = self._socket = self._tls.wrap(opened, listens=False)
            if not isinstance(opened, TlsSocket) or not opened.handshake():
                return  # the loop tells when it is writable
        except BlockingIOError:
            self._loop.rearm(opened, QUIET)
        except OSError as error:
            self._broken(error)
        else:
            self._loop.rearm(opened, QUIET)
            self._stage = _Stage.CHALLENGED

    def _broken(self, error: OSError) -> None:
        """A dial failed: TLS errors are a definite no, but for an end of the connection."""
        if isinstance(error, ssl.SSLEOFError):
            self._failed(self._unreachable(None))
        elif isinstance(error, ssl.SSLError):
            where = f"worker {self.peer} at {self._address.target!r}"
            self._refused(TlsRefused(f"no TLS with {where}: {explain(error)}"))
        else:
            self._failed(self._unreachable(error.errno))

    def _write(self) -> None:
        try:
            if self.queue.write():
                self._owner.drained()
        except OSError as error:
            self._owner.outgoing_ended(self, Ending(error=LinkClosed(f"worker {self.peer} is gone: {error.strerror}")))

    def _listen(self, opened: socket.socket) -> Ending | None:
        """The peer only ever says good-bye here, or hangs up."""
        try:
            part = opened.recv(HEADER_BYTES + 1)
        except BlockingIOError:
            return None
        except OSError as error:
            part, cause = b"", f"is gone: {error.strerror}"
        else:
            cause = "hung up"
        goodbye = encode_goodbye(0)
        if not part:
            orderly = self._heard == goodbye
            return Ending(
                error=LinkClosed(f"worker {self.peer} {'said good-bye' if orderly else cause}"), orderly=orderly
            )
        self._heard += part
        if not goodbye.startswith(self._heard):
            return Ending(error=ProtocolError(f"worker {self.peer} sent data on a connection that is not its to use"))
        return None

    def _greet(self, opened: socket.socket) -> None:
        wanted = hello.CHALLENGE_BYTES if self._stage is _Stage.CHALLENGED else hello.WELCOME_BYTES
        try:
            part = opened.recv(wanted - len(self._heard))
        except BlockingIOError:
            return
        except OSError as error:
            self._broken(error)
            return
        if not part:
            self._failed(self._unreachable(None))
            return
        self._heard += part
        if len(self._heard) < wanted:
            return
        heard, self._heard = self._heard, b""
        try:
            self._answer(opened, heard)
        except hello.HelloRefused as error:
            self._refused(error)

    def _answer(self, opened: socket.socket, heard: bytes) -> None:
        if self._ends is None:
            self._ends = hello.Ends(
                token=self._token,
                sender=self._me,
                receiver=self.peer,
                listener_nonce=hello.read_challenge(heard),
                dialler_nonce=os.urandom(hello.NONCE_BYTES),
            )
            self._stage = _Stage.GREETED
            if not say(opened, hello.encode_hello(self._ends)):
                self._failed(self._unreachable(None))
            return
        hello.check_welcome(heard, self._ends)
        self._stage = _Stage.UP
        self._failures = 0
        self.queue.attach(opened)
        self._owner.outgoing_up(self)

    def _failed(self, error: LinkClosed) -> None:
        """Nobody answered: frames keep waiting, and it is tried again after a pause."""
        self._hang_up()
        pause = min(self._options.redial_first_s * 2.0 ** min(self._failures, 30), self._options.redial_limit_s)
        self._failures += 1
        self._loop.call_at(time.monotonic() + pause, self.redial)
        self._owner.dial_failed(self, error)

    def _refused(self, error: ProtocolError) -> None:
        """A definite no, which another dial would not change: frames are dropped as with a broken connection."""
        self.reset()
        self._owner.dial_failed(self, error)

    def redial(self) -> None:
        """Dial if frames wait."""
        if self.queue.queued_bytes:
            self.dial()

    def move(self, address: LinkAddress) -> None:
        """The peer listens elsewhere now: a dial under way, or its pause, is given up for another; a link stays."""
        self._address = address
        if self._stage in _UNDER_WAY:
            self._hang_up()
        self.redial()

    def reset(self) -> None:
        """Close the connection and drop the frames that wait; the next frame dials anew."""
        self.queue.detach()  # before the socket goes: from here on nobody else writes to it
        self._hang_up()
        self._owner.drained()

    def _hang_up(self) -> None:
        if self._socket is not None:
            self._loop.unwatch(self._socket)
        self._socket = None
        self._ends = None
        self._heard = b""
        if self._stage is not _Stage.CLOSED:
            self._stage = _Stage.IDLE

    def close(self, *, goodbye: bool) -> None:
        """Close for good, after `queue.close()`; with `goodbye` the peer learns that it was on purpose."""
        self._stage = _Stage.CLOSED
        self.queue.take_socket(goodbye=goodbye)
        self._hang_up()
        self._owner.drained()
