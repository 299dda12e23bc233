"""Addresses of links ("unix:PATH", "tcp:HOST:PORT") and the sockets made from them."""

import errno
import ipaddress
import os
import socket
import stat
import struct
from contextlib import closing
from dataclasses import dataclass

from elaswave.certificates import TlsFiles
from elaswave.errors import ConfigError

UNIX_PATH_LIMIT_BYTES = 107  # sockaddr_un.sun_path without its final zero
PORT_LIMIT = 1 << 16
BACKLOG = 1024
_CREDENTIALS = struct.Struct("3i")  # ucred: pid, uid, gid


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkOptions:
    """What can be set about links; the defaults suit a worker with up to a few hundred peers."""

    socket_buffer_bytes: int = 1 << 20
    """Send and receive buffer asked of the kernel, which doubles it and caps it by net.core.[rw]mem_max."""

    direct_bytes: int = (1 << 20) + (4 << 10)
    """At most so much of a frame is written by the thread that calls `send`; the I/O thread writes the rest.

    A payload of 1 MiB goes with its header: a rest of some bytes would wait till the I/O thread has its turns again.
    """

    queue_limit_bytes: int | None = None
    """Per peer: `send` raises LinkBacklog where more would wait. None: no limit beyond what the caller keeps."""

    shared_memory: bool = False
    """Payloads for peers at Unix sockets travel in memory shared with them. All workers of a job set it alike."""

    checksums: bool = False
    """Each frame carries a CRC-32 of itself. All workers of a job set it alike; payloads in shared memory have none."""

    tls: TlsFiles | None = None
    """TCP is TLS 1.3, and both sides show a certificate of the authority. All workers of a job set it alike."""

    hello_limit_s: float = 10.0
    """A dial is given up, and an accepted connection dropped, that has not finished its hello by then."""

    redial_first_s: float = 0.01
    redial_limit_s: float = 0.5
    """Pause after a failed dial: the first, doubled each time up to the limit."""

    user_timeout_s: float = 15.0
    """TCP: a connection whose data is not acknowledged, or whose peer reads nothing, for so long is broken."""

    keepalive_idle_s: int = 5
    keepalive_interval_s: int = 3
    keepalive_probes: int = 3
    """TCP: an idle connection to a lost host is broken after idle + interval * probes seconds."""


@dataclass(frozen=True, slots=True, kw_only=True)
class UnixAddress:
    """A Unix socket by its path."""

    path: str

    @property
    def target(self) -> str:
        """What `connect` takes."""
        return self.path


@dataclass(frozen=True, slots=True, kw_only=True)
class TcpAddress:
    """A numeric IPv4 or IPv6 address and a port."""

    host: str
    port: int

    @property
    def target(self) -> tuple[str, int]:
        """What `connect` takes."""
        return (self.host, self.port)

    @property
    def family(self) -> socket.AddressFamily:
        """AF_INET or AF_INET6."""
        return socket.AF_INET6 if ":" in self.host else socket.AF_INET


LinkAddress = UnixAddress | TcpAddress


def parse_address(address: str) -> LinkAddress:
    """Read "unix:PATH", "tcp:HOST:PORT" or "tcp:[IPV6]:PORT"; ConfigError for anything else. Never looks up a name."""
    scheme, _, rest = address.partition(":")
    if scheme == "unix" and rest:
        if len(os.fsencode(rest)) > UNIX_PATH_LIMIT_BYTES:
            raise ConfigError(
                f"socket path {rest!r} is longer than {UNIX_PATH_LIMIT_BYTES} bytes: use a shorter folder"
            )
        return UnixAddress(path=rest)
    if scheme == "tcp":
        host, _, port = rest.rpartition(":")
        host = host.removeprefix("[").removesuffix("]")
        if not port.isdecimal() or int(port) >= PORT_LIMIT:
            raise ConfigError(f"port {port!r} of link address {address!r} is not within 0..{PORT_LIMIT - 1}")
        try:
            ip = ipaddress.ip_address(host)
        except ValueError as error:
            raise ConfigError(f"host {host!r} of link address {address!r} is not a numeric IP address") from error
        if ip.is_unspecified:
            raise ConfigError(f"link address {address!r} names no interface: give the address that peers can reach")
        return TcpAddress(host=str(ip), port=int(port))
    raise ConfigError(f"link address {address!r} is neither unix:PATH nor tcp:HOST:PORT")


def open_socket(address: LinkAddress, options: LinkOptions) -> socket.socket:
    """A non-blocking stream socket for dialling or listening at `address`, with its buffers and timeouts set."""
    family = socket.AF_UNIX if isinstance(address, UnixAddress) else address.family
    opened = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
    # Before connect and listen: the TCP window scale is fixed by then, and accepted sockets inherit.
    opened.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, options.socket_buffer_bytes)
    opened.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, options.socket_buffer_bytes)
    if isinstance(address, TcpAddress):
        tune_tcp(opened, options)
    return opened


def process_behind(opened: socket.socket) -> int:
    """Process id, by the kernel's word, of who listens or has dialled at the other end of a Unix socket."""
    process, _, _ = _CREDENTIALS.unpack(opened.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size))
    return int(process)


def tune_tcp(opened: socket.socket, options: LinkOptions) -> None:
    """No delay for small frames, and a bound on how long a lost host goes unnoticed."""
    opened.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    opened.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    opened.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, options.keepalive_idle_s)
    opened.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, options.keepalive_interval_s)
    opened.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, options.keepalive_probes)
    opened.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(options.user_timeout_s * 1000))


def open_listener(address: LinkAddress, options: LinkOptions) -> tuple[socket.socket, str]:
    """A listening socket and the address to give to peers (port 0 replaced by the one picked).

    Raises ConfigError if the address is in use or not ours. A socket file that nobody listens at any more is replaced.
    """
    listener = open_socket(address, options)
    try:
        if isinstance(address, UnixAddress):
            _bind_unix(listener, address)
            given = f"unix:{address.path}"
        else:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address.target)
            host, port = listener.getsockname()[:2]
            given = f"tcp:[{host}]:{port}" if ":" in host else f"tcp:{host}:{port}"
        listener.listen(BACKLOG)
    except OSError as error:
        listener.close()
        raise ConfigError(f"cannot listen at {address.target!r}: {error.strerror}; give another address") from error
    return listener, given


def _bind_unix(listener: socket.socket, address: UnixAddress) -> None:
    try:
        listener.bind(address.path)
        return
    except OSError as error:
        if error.errno != errno.EADDRINUSE:
            raise
    if not stat.S_ISSOCK(os.stat(address.path).st_mode):
        raise OSError(errno.EEXIST, "a file of another kind is there")
    with closing(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)) as probe:
        if probe.connect_ex(address.path) != errno.ECONNREFUSED:
            raise OSError(errno.EADDRINUSE, "somebody listens there already")
    os.unlink(address.path)  # left by a killed process
    listener.bind(address.path)
