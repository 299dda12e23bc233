"""Switchboard: the table of peers. It joins the two connections with a peer to one thing that is up or down."""

import socket
import time
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from elaswave.comm.addresses import LinkOptions, process_behind
from elaswave.comm.frames import HEADER_BYTES, Deliver, FrameReader
from elaswave.comm.inbox import ConnectionRefused, LinksFailed, LinkSink, PeerClosed, Received
from elaswave.comm.incoming import Ending, Incoming, Listener
from elaswave.comm.loop import Loop
from elaswave.comm.outgoing import Outgoing
from elaswave.comm.receive_memory import ReceiveMemory
from elaswave.comm.shared_payloads import PayloadPool, PeerMemory
from elaswave.comm.statistics import LinkStatistics, TrafficCounter
from elaswave.core.ids import WorkerId
from elaswave.errors import InvariantError, LinkClosed, PeerError, ProtocolError

REFUSAL_REPORT_PAUSE_S = 1.0


class Switchboard:
    """Who is connected with whom; what becomes of it is put into the inbox. All methods are for the I/O thread.

    Either connection with a peer breaking takes down the other, after the frames that are here already are delivered:
    so each loss is one incident, known to both ends, and nothing is lost without a PeerClosed.
    """

    def __init__(
        self,
        *,
        inbox: LinkSink,
        payload_limit_bytes: int,
        options: LinkOptions,
        current: Callable[[WorkerId], Outgoing | None],
        on_drained: Callable[[], None],
        pool: PayloadPool | None = None,
    ) -> None:
        """`pool`: where payloads are shared with peers on this host."""
        self.loop = Loop(on_failure=self._loop_failed, on_end=self._shut)
        self.failure: InvariantError | None = None
        self.sent = TrafficCounter()
        self.drained = on_drained
        self.forgetting: set[WorkerId] = set()  # added to by any thread: no more reports until `forget`
        self._inbox = inbox
        self._payload_limit_bytes = payload_limit_bytes
        self._options = options
        self._pool = pool
        self._memory = ReceiveMemory()
        self._current = current  # the outgoing link in use with a peer
        self._outgoing: set[Outgoing] = set()
        self._incoming: dict[WorkerId, Incoming] = {}
        self._listeners: list[Listener] = []
        self._down: set[WorkerId] = set()  # reported, and not up since
        self._received = TrafficCounter()
        self._accepted = 0
        self._dials = 0
        self._incidents = 0
        self._failed_dials = 0
        self._refusals = 0
        self._next_refusal_report = 0.0

    def listen(self, listener: Listener) -> None:
        """Accept connections from now on."""
        self._listeners.append(listener)
        listener.open()

    def dial(self, outgoing: Outgoing) -> None:
        """Connect, frames wait."""
        if not outgoing.is_closed:
            self._outgoing.add(outgoing)
            outgoing.dial()

    def watch(self, outgoing: Outgoing) -> None:
        """Connect if the peer has not."""
        if outgoing.peer not in self._incoming:
            self.dial(outgoing)

    def forget(self, peer: WorkerId, outgoing: Outgoing | None, *, goodbye: bool) -> None:
        """Close what there is with `peer`, without a report. `outgoing.queue` is closed already."""
        if outgoing is not None:
            self._outgoing.discard(outgoing)
            outgoing.close(goodbye=goodbye)
        incoming = self._incoming.pop(peer, None)
        if incoming is not None:
            incoming.close(self.loop, goodbye=True)
        self._down.discard(peer)
        self.forgetting.discard(peer)

    def welcomed(self, peer: WorkerId, opened: socket.socket) -> None:
        """`peer` has dialled us: frames of its earlier connection come first, then it counts as broken."""
        if peer in self._incoming:
            self._break(peer, Ending(error=LinkClosed(f"worker {peer} dialled anew")))
        shares = self._pool is not None and opened.family == socket.AF_UNIX
        borrow = PeerMemory(process_behind(opened)).borrow if shares else None
        checksums = self._options.checksums
        deliver, reserve = self._deliverer(peer), self._memory.take
        reader = FrameReader(self._payload_limit_bytes, deliver, borrow, checksums=checksums, reserve=reserve)
        incoming = Incoming(peer, opened, self, reader)
        self._incoming[peer] = incoming
        self._accepted += 1
        self._down.discard(peer)
        self.loop.change_handler(opened, incoming)

    def _deliverer(self, peer: WorkerId) -> Deliver:
        put, count = self._inbox.put, self._received.add

        def deliver(kind: int, meta: bytes, payload: NDArray[np.uint8]) -> None:
            count(kind, HEADER_BYTES + len(meta) + payload.size)
            put(Received(peer, kind, meta, payload))

        return deliver

    def incoming_ended(self, incoming: Incoming, ending: Ending) -> None:
        """The peer hung up, or sent what it should not have."""
        self._break(incoming.peer, ending)

    def outgoing_up(self, outgoing: Outgoing) -> None:
        """A dial came through."""
        self._dials += 1
        self._down.discard(outgoing.peer)
        if self._pool is not None and outgoing.is_on_this_host:
            self._pool.connected(outgoing.peer, outgoing.peer_process)

    def outgoing_ended(self, outgoing: Outgoing, ending: Ending) -> None:
        """The peer hung up."""
        self._break(outgoing.peer, ending)

    def _break(self, peer: WorkerId, ending: Ending) -> None:
        orderly = ending.orderly
        incoming = self._incoming.pop(peer, None)
        if incoming is not None:
            orderly |= incoming.drain()
            incoming.close(self.loop, goodbye=False)
        outgoing = self._current(peer)
        if outgoing is not None and outgoing.is_up:
            outgoing.reset()
        self._incidents += 1
        # Last: a frame sent after this item is seen must not be among those that were dropped.
        self._report(peer, ending.error, orderly=orderly)

    def _report(self, peer: WorkerId, error: PeerError, *, orderly: bool = False) -> None:
        if peer in self.forgetting:
            return
        self._down.add(peer)
        self._inbox.put(PeerClosed(peer=peer, error=error, orderly=orderly))

    def dial_failed(self, outgoing: Outgoing, error: PeerError) -> None:
        """Reported once until the peer is reached, unless frames were dropped."""
        self._failed_dials += 1
        if outgoing.peer not in self._down or isinstance(error, ProtocolError):
            self._report(outgoing.peer, error)

    def refused(self, error: PeerError) -> None:
        """A connection did not become a link; reports are rare, so that an intruder cannot fill the inbox."""
        self._refusals += 1
        now = time.monotonic()
        if now >= self._next_refusal_report:
            self._next_refusal_report = now + REFUSAL_REPORT_PAUSE_S
            self._inbox.put(ConnectionRefused(error=error, count=self._refusals))

    def statistics(self) -> LinkStatistics:
        """Counts so far. Any thread."""
        return LinkStatistics(
            sent=self.sent.snapshot(),
            received=self._received.snapshot(),
            dials=self._dials,
            accepted=self._accepted,
            incidents=self._incidents,
            failed_dials=self._failed_dials,
            refusals=self._refusals,
        )

    def _loop_failed(self, error: Exception) -> None:
        self.failure = InvariantError(f"the I/O thread of the links failed: {error!r}")
        self.failure.__cause__ = error
        self._inbox.put(LinksFailed(error=self.failure))

    def _shut(self) -> None:
        """The loop ends: close everything; in order unless it failed."""
        in_order = self.failure is None
        for listener in self._listeners:
            listener.close()
        for incoming in self._incoming.values():
            incoming.close(self.loop, goodbye=in_order)
        for outgoing in self._outgoing:
            whole = outgoing.queue.close(self.failure or LinkClosed("the links are closed"))
            outgoing.close(goodbye=in_order and whole)
        self._listeners.clear()
        self._incoming.clear()
        self._outgoing.clear()
