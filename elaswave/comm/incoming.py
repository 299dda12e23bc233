"""Connections that peers dialled: the listener, hellos under way, and what frames arrive by. I/O thread only."""

import errno
import os
import socket
import ssl
import time
from contextlib import suppress
from dataclasses import dataclass
from itertools import count as numbers
from typing import Protocol

from elaswave.comm import hello
from elaswave.comm.addresses import LinkOptions, tune_tcp
from elaswave.comm.frames import FrameReader, encode_goodbye
from elaswave.comm.loop import Loop
from elaswave.comm.sending import QUIET, WRITABLE
from elaswave.comm.tls import TlsContexts, TlsRefused, TlsSocket, explain, held_bytes
from elaswave.core.ids import WorkerId
from elaswave.errors import LinkClosed, PeerError

ACCEPTS_PER_TURN = 32
HELLOS_AT_ONCE = 1024
READS_PER_TURN = 16
# A dead peer's last frames are read to the end before its death is reported, a live one's only so far.
READS_AT_END = 1024
ACCEPT_PAUSE_S = 0.1
REFUSED_BYTES = 16 << 10  # more than the first message of TLS


@dataclass(frozen=True, slots=True, kw_only=True)
class Ending:
    """How a connection ended. orderly: the other side had said good-bye."""

    error: PeerError
    orderly: bool = False


class IncomingOwner(Protocol):
    """Who keeps the table of peers."""

    def welcomed(self, peer: WorkerId, opened: socket.socket) -> None:
        """`peer` has proven itself on `opened`, which is watched by the caller until it is handed on."""

    def incoming_ended(self, incoming: "Incoming", ending: Ending) -> None:
        """No further frame comes by `incoming`; it still has its socket."""

    def refused(self, error: PeerError) -> None:
        """A connection did not become a link."""


class Incoming:
    """Frames from one peer, by a connection that it dialled."""

    def __init__(self, peer: WorkerId, opened: socket.socket, owner: IncomingOwner, reader: FrameReader) -> None:
        self.peer = peer
        self._socket = opened
        self._may_hold = isinstance(opened, TlsSocket)
        self._owner = owner
        self._reader = reader

    def on_event(self, events: int) -> None:
        """Deliver what is here, a share of it if it is much."""
        ending = self._read(READS_PER_TURN, to_the_end=False)
        if ending is not None:
            self._owner.incoming_ended(self, ending)

    def drain(self) -> bool:
        """Deliver what is here still; whether the peer has said good-bye."""
        self._read(READS_AT_END, to_the_end=True)
        return self._reader.goodbye

    def _read(self, reads: int, *, to_the_end: bool) -> Ending | None:
        reader = self._reader
        try:
            for number in numbers():
                buffer = reader.buffer()
                if number >= reads:  # what TLS holds, the loop does not tell of again
                    held = held_bytes(self._socket)
                    if not held:
                        return None
                    buffer = buffer[:held]
                count = self._socket.recv_into(buffer)
                if not count:
                    return self._hung_up()
                reader.advance(count)
                if to_the_end:
                    continue
                # Most likely all that there was; if not, the loop tells again, but for what TLS holds.
                if count < len(buffer) or not (reader.inside_frame or self._may_hold):
                    return None
        except BlockingIOError:
            return None
        except OSError as error:
            return Ending(error=LinkClosed(f"worker {self.peer} is gone: {error.strerror}"))
        except PeerError as error:
            return Ending(error=error)
        return None

    def _hung_up(self) -> Ending:
        if self._reader.goodbye:
            return Ending(error=LinkClosed(f"worker {self.peer} said good-bye"), orderly=True)
        where = " in the middle of a frame" if self._reader.inside_frame else ""
        return Ending(error=LinkClosed(f"worker {self.peer} hung up{where}"))

    def close(self, loop: Loop, *, goodbye: bool) -> None:
        """Close the connection; with `goodbye` the peer learns that it was on purpose."""
        if goodbye:
            say(self._socket, encode_goodbye(0))
        loop.unwatch(self._socket)


def say(opened: socket.socket, message: bytes) -> bool:
    """Send a short message on a connection that has room for it; False if it is gone or full."""
    try:
        return opened.send(message, socket.MSG_NOSIGNAL) == len(message)
    except OSError:
        return False  # whoever watches the socket is told of the cause


class Greeting:
    """A connection that was accepted and has not proven itself yet."""

    def __init__(self, opened: socket.socket, listener: "Listener", nonce: bytes) -> None:
        self.opened = opened
        self.nonce = nonce
        self.data = b""
        self._listener = listener
        self._secured = not isinstance(opened, TlsSocket)

    def on_event(self, events: int) -> None:
        """Shake hands where that is TLS, then take what has come of the hello."""
        if not self._secured and isinstance(self.opened, TlsSocket):
            self._secure(self.opened)
            return
        try:
            part = self.opened.recv(hello.HELLO_BYTES - len(self.data))
        except BlockingIOError:
            return
        except OSError:
            part = b""
        self.data += part
        if not part or len(self.data) == hello.HELLO_BYTES:
            self._listener.heard(self)

    def _secure(self, opened: TlsSocket) -> None:
        try:
            self._secured = opened.handshake()
        except BlockingIOError:
            self._listener.awaits(self, QUIET)
        except OSError as error:
            self._listener.insecure(self, error)
        else:
            self._listener.awaits(self, QUIET if self._secured else WRITABLE)
            if self._secured:
                self.challenge()

    def challenge(self) -> None:
        """Say the first message."""
        say(self.opened, hello.encode_challenge(self.nonce))


class Listener:
    """Accepts connections and hears their hellos."""

    def __init__(
        self,
        opened: socket.socket,
        *,
        me: WorkerId,
        token: bytes,
        loop: Loop,
        owner: IncomingOwner,
        options: LinkOptions,
        tls: TlsContexts | None = None,
    ) -> None:
        self._socket = opened
        self._me = me
        self._token = token
        self._loop = loop
        self._owner = owner
        self._options = options
        self._tls = tls
        self._greetings: set[Greeting] = set()
        self._closed = False

    def open(self) -> None:
        """Watch the listening socket."""
        self._loop.watch(self._socket, self, QUIET)

    def on_event(self, events: int) -> None:
        """Accept who waits."""
        for _ in range(ACCEPTS_PER_TURN):
            try:
                opened, _ = self._socket.accept()
            except BlockingIOError:
                return
            except OSError as error:
                if error.errno == errno.ECONNABORTED:
                    continue
                self._pause(error)
                return
            self._greet(opened)

    def _pause(self, error: OSError) -> None:
        """Out of descriptors or memory: the waiting connection would wake the loop again at once, for nothing."""
        self._owner.refused(LinkClosed(f"cannot accept a connection: {error.strerror}; trying again"))
        self._loop.rearm(self._socket, 0)
        self._loop.call_at(time.monotonic() + ACCEPT_PAUSE_S, self._resume)

    def _resume(self) -> None:
        if not self._closed:
            self._loop.rearm(self._socket, QUIET)

    def _greet(self, opened: socket.socket) -> None:
        if len(self._greetings) >= HELLOS_AT_ONCE:
            self._owner.refused(LinkClosed(f"{HELLOS_AT_ONCE} connections without a hello: one more was closed"))
            opened.close()
            return
        opened.setblocking(False)
        if opened.family != socket.AF_UNIX:
            tune_tcp(opened, self._options)
        if self._tls is not None:
            try:
                opened = self._tls.wrap(opened, listens=True)
            except OSError:  # it has hung up already
                opened.close()
                return
        greeting = Greeting(opened, self, os.urandom(hello.NONCE_BYTES))
        self._loop.watch(opened, greeting, QUIET)
        self._greetings.add(greeting)
        if self._tls is None:
            greeting.challenge()
        self._loop.call_at(time.monotonic() + self._options.hello_limit_s, lambda: self._give_up(greeting))

    def _give_up(self, greeting: Greeting) -> None:
        if greeting in self._greetings:
            self._drop(greeting, LinkClosed(f"a connection sent no hello within {self._options.hello_limit_s} s"))

    def awaits(self, greeting: Greeting, events: int) -> None:
        """Its handshake goes on with these events."""
        self._loop.rearm(greeting.opened, events)

    def insecure(self, greeting: Greeting, error: OSError) -> None:
        """Its handshake failed, or it hung up."""
        if isinstance(error, ssl.SSLError) and not isinstance(error, ssl.SSLEOFError):
            self._drop(greeting, TlsRefused(f"no TLS with who dialled: {explain(error)}"))
        else:
            self._drop(greeting, LinkClosed(f"a connection ended during its TLS handshake: {error.strerror}"))

    def _drop(self, greeting: Greeting, error: PeerError | None) -> None:
        self._greetings.discard(greeting)
        self._loop.unwatch(greeting.opened)
        if error is not None:
            self._owner.refused(error)

    def heard(self, greeting: Greeting) -> None:
        """The hello of `greeting` is complete, or it hung up."""
        if len(greeting.data) < hello.HELLO_BYTES:
            cut = LinkClosed(f"a connection ended after {len(greeting.data)} of {hello.HELLO_BYTES} bytes of its hello")
            self._drop(greeting, cut if greeting.data else None)  # without any: a probe, or a dialler that gave up
            return
        try:
            ends = hello.read_hello(greeting.data, token=self._token, me=self._me, listener_nonce=greeting.nonce)
        except hello.HelloRefused as error:
            say(greeting.opened, error.answer)
            self._read_up(greeting.opened)
            self._drop(greeting, error)
            return
        if not say(greeting.opened, hello.encode_welcome(ends)):
            self._drop(greeting, None)
            return
        self._greetings.discard(greeting)
        self._owner.welcomed(ends.sender, greeting.opened)

    def _read_up(self, opened: socket.socket) -> None:
        """What lies there unread would make the kernel reset the connection, and the peer lose what we have said."""
        with suppress(OSError):
            opened.recv(REFUSED_BYTES)

    def close(self) -> None:
        """Stop listening and drop who has not proven itself."""
        self._closed = True
        for greeting in tuple(self._greetings):
            self._drop(greeting, None)
        self._loop.unwatch(self._socket)
