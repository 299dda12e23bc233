"""TLS under TCP links: who may talk at all. Who a peer is, the hello proves inside, with the job token."""

import errno
import socket
import ssl
import threading
from collections.abc import Iterable, Iterator
from typing import Self

from elaswave.certificates import TlsFiles, make_context
from elaswave.errors import InvariantError, ProtocolError

RECORD_BYTES = 16 << 10
"""The most that one TLS record carries."""

Bytes = bytes | bytearray | memoryview

_NO_TLS = {"WRONG_VERSION_NUMBER", "UNSUPPORTED_PROTOCOL", "HTTP_REQUEST", "PACKET_LENGTH_TOO_LONG"}
_ALERTS = {
    "TLSV1_ALERT_UNKNOWN_CA": "it refused our certificate: not signed by its authority",
    "TLSV1_ALERT_DECRYPT_ERROR": "it refused our certificate: not signed by its authority",
    "SSLV3_ALERT_CERTIFICATE_EXPIRED": "it refused our certificate: expired or not valid yet",
    "SSLV3_ALERT_BAD_CERTIFICATE": "it refused our certificate",
    "TLSV13_ALERT_CERTIFICATE_REQUIRED": "it wants a certificate of ours",
}
_UNTRUSTED = {7, 18, 19, 20, 21}  # X509_V_ERR_*: bad signature, self-signed, issuer unknown
_OUT_OF_DATE = {9: "is not valid yet", 10: "has expired"}


class TlsRefused(ProtocolError):
    """A TLS handshake that came to nothing, and would the next time."""


class TlsSocket(ssl.SSLSocket):
    """An SSLSocket with the manners of a plain non-blocking one: BlockingIOError, gathered writes, any two threads.

    A write that was cut short must be repeated with the same bytes and perhaps more, as queues of frames do.
    """

    _lock: threading.Lock

    def __new__(cls, *arguments: object, **options: object) -> Self:
        """With a lock: OpenSSL may write while it reads, so even one reader and one writer must take turns."""
        made = super().__new__(cls)
        made._lock = threading.Lock()
        return made

    def handshake(self) -> bool:
        """Go on with it; whether it is done. Raises BlockingIOError to wait for input, OSError where it fails."""
        try:
            with self._lock:
                self.do_handshake()
        except ssl.SSLWantReadError as error:
            raise BlockingIOError(errno.EAGAIN, "nothing to read") from error
        except ssl.SSLWantWriteError:
            return False
        return True

    def recv(self, buflen: int = 1024, flags: int = 0) -> bytes:
        """At most one record; b"" at the end. Raises BlockingIOError."""
        try:
            with self._lock:
                return super().recv(buflen)
        except (ssl.SSLWantReadError, ssl.SSLWantWriteError) as error:
            raise BlockingIOError(errno.EAGAIN, "nothing to read") from error

    def recv_into(self, buffer: Bytes, nbytes: int | None = None, flags: int = 0) -> int:  # type: ignore[override]
        """Fill `buffer` as far as there is data: fewer bytes mean that no more is here. Raises BlockingIOError."""
        view, taken = memoryview(buffer), 0
        while taken < len(view):
            try:
                with self._lock:
                    count = super().recv_into(view[taken:])
            except (ssl.SSLWantReadError, ssl.SSLWantWriteError) as error:
                if not taken:
                    raise BlockingIOError(errno.EAGAIN, "nothing to read") from error
                break
            except OSError:
                if not taken:
                    raise
                break  # for the next call to find
            taken += count
            if not count:
                break
        return taken

    def send(self, data: Bytes, flags: int = 0) -> int:  # type: ignore[override]
        """As `sendmsg` with one part."""
        return self.sendmsg([data])

    def sendmsg(self, buffers: Iterable[Bytes], ancdata: object = (), flags: int = 0) -> int:  # type: ignore[override]
        """Write as much as the kernel takes now. Raises BlockingIOError if that is nothing."""
        sent = 0
        for record in _records([memoryview(part) for part in buffers]):
            try:
                with self._lock:
                    count = super().send(record)
            except (ssl.SSLWantReadError, ssl.SSLWantWriteError) as error:
                if not sent:
                    raise BlockingIOError(errno.EAGAIN, "no room to write") from error
                break
            except OSError:
                if not sent:
                    raise
                break
            sent += count
            if count < len(record):
                break
        return sent


def _records(parts: list[memoryview]) -> Iterator[bytes | memoryview]:
    """The bytes of `parts` in pieces of a record each, the last one shorter; large parts are not copied."""
    small: list[memoryview] = []
    room = RECORD_BYTES
    for part in parts:
        start = 0
        while start < len(part):
            piece = part[start : start + room]
            start += len(piece)
            small.append(piece)
            room -= len(piece)
            if not room:
                yield small[0] if len(small) == 1 else b"".join(small)
                small, room = [], RECORD_BYTES
    if small:
        yield small[0] if len(small) == 1 else b"".join(small)


def held_bytes(opened: socket.socket) -> int:
    """Bytes that were received and decrypted, and wait where the kernel cannot tell of them."""
    return opened.pending() if isinstance(opened, TlsSocket) else 0


class TlsContexts:
    """What the files hold, for both roles. Nothing is read before `load`."""

    def __init__(self, files: TlsFiles) -> None:
        self._files = files
        self._lock = threading.Lock()
        self._roles: dict[bool, ssl.SSLContext] = {}  # by whether it is the listener's

    def load(self) -> None:
        """Read the files, the first time. Raises ConfigError that names the one that will not do."""
        with self._lock:
            if not self._roles:
                roles = {listens: _context(self._files, listens=listens) for listens in (False, True)}
                self._roles = roles

    def wrap(self, opened: socket.socket, *, listens: bool) -> TlsSocket:
        """TLS on a connected socket, which is taken over with its number. Raises OSError if it is broken already."""
        wrapped = self._roles[listens].wrap_socket(opened, server_side=listens, do_handshake_on_connect=False)
        if not isinstance(wrapped, TlsSocket):
            raise InvariantError(f"TLS context made a {type(wrapped).__name__}, not a TlsSocket")
        return wrapped


def _context(files: TlsFiles, *, listens: bool) -> ssl.SSLContext:
    context = make_context(files, listens=listens)
    context.sslsocket_class = TlsSocket
    if listens:
        context.num_tickets = 0  # nothing is resumed
    return context


def explain(error: ssl.SSLError) -> str:
    """What is wrong, as far as TLS tells; of "it", the peer."""
    if isinstance(error, ssl.SSLCertVerificationError):
        found = error.verify_message
        if error.verify_code in _UNTRUSTED:
            return f"its certificate is not signed by our authority ({found})"
        return f"its certificate {_OUT_OF_DATE.get(error.verify_code, 'will not do')} ({found})"
    reason = error.reason or str(error)
    if reason in _NO_TLS:
        return f"it speaks no TLS 1.3 ({reason}): set LinkOptions.tls on all workers, or on none"
    return f"{_ALERTS.get(reason, 'the TLS connection failed')} ({reason})"
