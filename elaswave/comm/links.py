"""Links: ordered frames between this worker and its peers, over Unix sockets or TCP. See docs/links.md."""

import os
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from functools import partial

import numpy as np
from numpy.typing import NDArray

from elaswave.comm.addresses import LinkAddress, LinkOptions, UnixAddress, open_listener, parse_address
from elaswave.comm.frames import HEADER_BYTES, SHARED, aligned_buffer, check_frame
from elaswave.comm.hello import WORKER_LIMIT
from elaswave.comm.inbox import LinkSink
from elaswave.comm.incoming import Listener
from elaswave.comm.outgoing import Outgoing
from elaswave.comm.shared_payloads import PayloadPool
from elaswave.comm.statistics import LinkStatistics
from elaswave.comm.switchboard import Switchboard
from elaswave.comm.tls import TlsContexts
from elaswave.core.ids import WorkerId
from elaswave.errors import ConfigError, DeadlineExceeded, InvariantError, LinkClosed

Payload = bytes | bytearray | memoryview | NDArray[np.uint8]

SHARED_BYTES = 8 << 10
"""Payloads from here on go through shared memory where that is on: smaller ones cost less in the frame."""

JOIN_LIMIT_S = 2.0  # the I/O thread never waits for a peer, so only a hogged machine takes it this long


class Links:
    """All links of one worker: one I/O thread, one connection per peer and direction, dialled by the sender.

    Frames to a peer arrive whole, once, in the order sent, or a PeerClosed says that some may be lost. What arrives,
    and what goes wrong, is put into `inbox`. Nothing is opened before `listen` and `start`, so an object may be made
    before a fork, but used on one side only.
    """

    def __init__(
        self,
        me: WorkerId,
        token: bytes,
        inbox: LinkSink,
        *,
        payload_limit_bytes: int,
        options: LinkOptions | None = None,
    ) -> None:
        """token: the job's secret, the same on all workers. payload_limit_bytes: the largest payload sent or taken."""
        if not token:
            raise ConfigError("the job token is empty: links need a secret that all workers of the job share")
        if not 0 <= me < WORKER_LIMIT:
            raise ConfigError(f"worker id {me} is not within 0..2^64-1")
        if payload_limit_bytes < 0:
            raise ConfigError(f"payload limit of {payload_limit_bytes} bytes is below 0")
        self._me = me
        self._inbox = inbox
        self._token = token
        self._limit = payload_limit_bytes
        self._options = options if options is not None else LinkOptions()
        self._tls = TlsContexts(self._options.tls) if self._options.tls is not None else None
        self._lock = threading.Lock()  # guards the next five
        self._addresses: dict[WorkerId, LinkAddress] = {}
        self._outgoing: dict[WorkerId, Outgoing] = {}
        self._socket_paths: list[str] = []
        self._started = False
        self._closed = False
        self._drained = threading.Condition()
        self._pool = PayloadPool() if self._options.shared_memory else None
        self._board = Switchboard(
            inbox=inbox,
            payload_limit_bytes=payload_limit_bytes,
            options=self._options,
            current=self._outgoing.get,
            on_drained=self._tell_drained,
            pool=self._pool,
        )

    def listen(self, address: str) -> str:
        """Accept peers at "unix:PATH" or "tcp:HOST:PORT" (port 0: any); returns the address to give to them.

        Raises ConfigError if that is in use, too long or not of this machine, or if a file of TLS will not do.
        """
        parsed = parse_address(address)
        if self._tls is not None:
            self._tls.load()
        opened, given = open_listener(parsed, self._options)
        listener = Listener(
            opened,
            me=self._me,
            token=self._token,
            loop=self._board.loop,
            owner=self._board,
            options=self._options,
            tls=None if isinstance(parsed, UnixAddress) else self._tls,
        )
        with self._lock:
            if isinstance(parsed, UnixAddress):
                self._socket_paths.append(parsed.path)
        self._board.loop.call_soon(partial(self._board.listen, listener))
        return given

    def start(self) -> None:
        """Start the I/O thread. Raises ConfigError if a file of TLS will not do."""
        if self._tls is not None:
            self._tls.load()
        with self._lock:
            if self._started or self._closed:
                raise InvariantError("links are started once, and before they are closed")
            self._started = True
        self._board.loop.start()
        self._inbox.attach(self._board.loop)

    def set_addresses(self, addresses: Mapping[WorkerId, str]) -> None:
        """Add or replace where peers listen; links that are up stay. ConfigError if one cannot be read: none is set."""
        parsed = {peer: parse_address(address) for peer, address in addresses.items()}
        with self._lock:
            for peer, address in parsed.items():
                known = self._addresses.get(peer)
                self._addresses[peer] = address
                outgoing = self._outgoing.get(peer)
                if outgoing is not None and address != known:
                    self._board.loop.call_soon(partial(outgoing.move, address))

    def send(
        self,
        peer: WorkerId,
        kind: int,
        meta: bytes,
        payload: Payload | None = None,
        *,
        copy: bool = False,
        more: bool = False,
    ) -> None:
        """Send one frame to `peer`; returns at once, whatever the peer does.

        With `more` this thread sends it another one at once, or calls `release`: both go to the kernel together.

        What the kernel does not take now waits in a queue, and `payload` is then referred to, not copied: leave it
        unchanged until `queued_bytes(peer)` is 0 or `flush` returns True, or pass copy=True, which copies only what
        has to wait. Dials on first use; frames wait while a peer cannot be reached. Raises ProtocolError over the
        limits, LinkBacklog over the queue limit, LinkClosed if `peer` has no address or the links are closed.
        """
        view = _as_bytes(payload) if payload is not None else None
        payload_bytes = 0 if view is None else len(view)
        check_frame(kind, len(meta), payload_bytes, self._limit)
        outgoing = self._outgoing.get(peer)
        if outgoing is None:
            outgoing = self._open(peer)
        sent, flags = (view, 0) if self._pool is None else self._as_sent(outgoing, view, copy=copy)
        if outgoing.queue.push(kind, meta, sent, copy=copy, flags=flags, more=more):
            self._board.loop.call_soon(partial(self._board.dial, outgoing))
        self._board.sent.add(kind, HEADER_BYTES + len(meta) + payload_bytes)

    def release(self, peer: WorkerId) -> None:
        """Let go what was sent with `more` and nothing followed."""
        outgoing = self._outgoing.get(peer)
        if outgoing is not None:
            outgoing.queue.release()

    def watch(self, peer: WorkerId) -> None:
        """Have the end of `peer` reported although nothing is sent to it: dial it, unless one has dialled the other.

        Raises LinkClosed as `send` does.
        """
        if self._outgoing.get(peer) is None:
            outgoing = self._open(peer)
            self._board.loop.call_soon(partial(self._board.watch, outgoing))

    def memory(self, nbytes: int) -> NDArray[np.uint8]:
        """Memory at a multiple of 64, not cleared, from which payloads are sent without a copy where that is possible.

        What was sent from it must not change any more: peers may read it in place as long as they live.
        """
        found = self._pool.take(nbytes) if self._pool is not None and nbytes >= SHARED_BYTES else None
        return aligned_buffer(nbytes) if found is None else found

    def _as_sent(self, outgoing: Outgoing, payload: memoryview | None, *, copy: bool) -> tuple[memoryview | None, int]:
        """The payload on the wire and its flags: itself, or where the peer finds it in shared memory."""
        if self._pool is None or payload is None or len(payload) < SHARED_BYTES or not outgoing.is_on_this_host:
            return payload, 0
        place = self._pool.lend(payload, outgoing.peer, copy=copy)
        return (payload, 0) if place is None else (memoryview(place), SHARED)

    def _open(self, peer: WorkerId) -> Outgoing:
        with self._lock:
            if self._board.failure is not None:
                raise self._board.failure
            if self._closed:
                raise LinkClosed(f"cannot send to worker {peer}: the links are closed")
            address = self._addresses.get(peer)
            if address is None or peer == self._me:
                raise LinkClosed(f"cannot send to worker {peer}: it has no address here; call set_addresses first")
            outgoing = self._outgoing.get(peer)
            if outgoing is None:
                outgoing = self._outgoing[peer] = Outgoing(
                    peer,
                    address,
                    me=self._me,
                    token=self._token,
                    loop=self._board.loop,
                    owner=self._board,
                    options=self._options,
                    tls=self._tls,
                )
            return outgoing

    def forget(self, peer: WorkerId) -> None:
        """Close the links with `peer` both ways, without a report; drop what waits for it, and its address.

        Frames that it had delivered stay in the inbox. It may dial us again, and its frames are then taken.
        """
        with self._lock:
            self._addresses.pop(peer, None)
            outgoing = self._outgoing.pop(peer, None)
            self._board.forgetting.add(peer)
        gone = LinkClosed(f"cannot send to worker {peer}: it was forgotten; call set_addresses first")
        whole = outgoing is not None and outgoing.queue.close(gone)
        self._board.loop.call_soon(partial(self._board.forget, peer, outgoing, goodbye=whole))

    def queued_bytes(self, peer: WorkerId | None = None) -> int:
        """Bytes of frames that wait here for `peer`, or for all peers: those that the kernel has not taken yet."""
        with self._lock:
            if peer is None:
                return sum(outgoing.queue.queued_bytes for outgoing in self._outgoing.values())
            outgoing = self._outgoing.get(peer)
            return 0 if outgoing is None else outgoing.queue.queued_bytes

    def flush(self, deadline: float) -> bool:
        """Wait until no frame waits here; False if `time.monotonic()` reaches `deadline` before.

        Then the kernel has all frames, or they were dropped and reported; it does not say that a peer has read them.
        """
        flushed = self._flush(deadline)
        if self._board.failure is not None:
            raise self._board.failure
        return flushed

    def _flush(self, deadline: float) -> bool:
        with self._drained:
            while self.queued_bytes():
                left = deadline - time.monotonic()
                if left <= 0:
                    return False
                self._drained.wait(left)
        return True

    def _tell_drained(self) -> None:
        with self._drained:
            self._drained.notify_all()

    def statistics(self) -> LinkStatistics:
        """Counts so far."""
        return self._board.statistics()

    def close(self, deadline_s: float) -> bool:
        """Flush for at most `deadline_s` seconds, say good-bye, close all and end the thread; whether all was flushed.

        Raises DeadlineExceeded if the thread does not end. A second call does nothing.
        """
        with self._lock:
            if self._closed:
                return True
            self._closed = True
        flushed = not self._started or self._flush(time.monotonic() + deadline_s)
        if not self._board.loop.stop(JOIN_LIMIT_S):
            raise DeadlineExceeded(f"the I/O thread of the links did not end within {JOIN_LIMIT_S} s")
        if self._pool is not None:
            self._pool.close()
        with self._lock:
            self._outgoing.clear()
            for path in self._socket_paths:
                with suppress(FileNotFoundError):
                    os.unlink(path)
        return flushed


def _as_bytes(payload: Payload) -> memoryview | None:
    view = payload.data if isinstance(payload, np.ndarray) else memoryview(payload)
    if not view.nbytes:
        return None
    if not view.c_contiguous:
        raise InvariantError(f"payload of shape {view.shape}, strides {view.strides} is not contiguous: copy it first")
    return view if view.ndim == 1 and view.format == "B" else view.cast("B")
