"""Endpoint: the links of one process, the communicators above them, and who drives them."""

import struct
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from hashlib import sha256

import torch
from torch import Tensor

from elaswave.comm.collectives.commands import Await
from elaswave.comm.communicator import Communicator, EditReport
from elaswave.comm.endpoint_options import EndpointOptions
from elaswave.comm.inbox import ConnectionRefused, LinkItem, LinksFailed, PeerClosed, Received
from elaswave.comm.links import Links
from elaswave.comm.mailbox import Awaited, Mailbox
from elaswave.comm.memory_inbox import MemoryInbox
from elaswave.comm.operation import Callback, Operation
from elaswave.comm.statistics import LinkStatistics
from elaswave.core.ids import WorkerId
from elaswave.errors import ConfigError, DeadlineExceeded, ElasWaveError, LinkClosed, ProtocolError

OPERATION = 1
MESSAGE = 2
NOTICE = 3
_OPERATION_META = struct.Struct("<QIQ")
_MESSAGE_META = struct.Struct("<QIq")

LATE_STORE_LIMIT = 4096
"""Frames kept for communicators that this process has not made yet. Over it the oldest go: those that never made one
will claim, such as the last words of a group that was destroyed here first."""

LARGE_BYTES = 1 << 20
"""While payloads from here on are worked on, the links' own thread may go on: that takes longer than a change of it."""

OnLost = Callable[[PeerClosed], None]
OnNotice = Callable[[WorkerId, bytes], None]


class Woken:
    """Put into the inbox to end a wait."""


class Endpoint:
    """Communicators of one process. Any thread may start operations and wait; one at a time drives them all.

    Whoever waits runs the I/O itself; a thread of its own drives what nobody waits for (`attend`).
    """

    def __init__(
        self,
        me: WorkerId,
        token: bytes,
        *,
        on_lost: OnLost,
        on_notice: OnNotice,
        options: EndpointOptions | None = None,
    ) -> None:
        """on_lost: a link to a peer broke. on_notice: a peer sent a notice. Both are called by whoever drives."""
        self.me = me
        self._options = options if options is not None else EndpointOptions()
        self._inbox: MemoryInbox[LinkItem | Woken] = MemoryInbox()
        limit = self._options.payload_limit_bytes
        self._links = Links(me, token, self._inbox, payload_limit_bytes=limit, options=self._options.links)
        self._on_lost = on_lost
        self._on_notice = on_notice
        self._communicators: dict[int, Communicator] = {}
        self._mailboxes: dict[int, Mailbox] = {}
        self._late: deque[Received] = deque(maxlen=LATE_STORE_LIMIT)
        self._departed: set[WorkerId] = set()
        self._watched: set[WorkerId] = set()
        self._state = threading.RLock()  # guards the communicators
        self._driving = threading.Lock()  # held by who waits on the inbox
        self._driver = 0  # its thread
        self._until = 0.0  # then it looks at deadlines again
        self._ended: list[Operation] = []  # not settled yet
        self._calls: deque[tuple[Callback, Operation]] = deque()  # of what has ended
        self._changed = threading.Condition()
        self._sleepers = 0  # threads that wait for a change, or are about to
        self._thread: threading.Thread | None = None
        self._failure: ElasWaveError | None = None
        self._closed = False

    # ------------------------------------------------------------------ life

    def open(self, address: str) -> str:
        """Listen at "unix:PATH" or "tcp:HOST:PORT"; returns the address for the peers."""
        given = self._links.listen(address)
        self._links.start()
        return given

    def listen(self, address: str) -> str:
        """Listen at one more address."""
        return self._links.listen(address)

    def connect(self, addresses: Mapping[WorkerId, str]) -> None:
        """Where peers listen; a link is dialled when something is first sent."""
        self._links.set_addresses({peer: address for peer, address in addresses.items() if peer != self.me})

    def forget(self, peer: WorkerId) -> None:
        """Close the links with a peer without a report."""
        self._links.forget(peer)
        self._watched.discard(peer)

    def report_lost(self, peer: WorkerId, why: str) -> None:
        """Have `on_lost` called as if the links with `peer` had broken. Any thread; never blocks."""
        self._inbox.put(PeerClosed(peer=peer, error=LinkClosed(f"worker {peer} is lost: {why}")))

    def depart(self, peer: WorkerId) -> None:
        """It has left in order. `on_lost` is called once something is awaited of it that has not come."""
        with self._state:
            self._departed.add(peer)
            for identity, communicator in self._communicators.items():
                communicator.depart(peer)
                if self._mailboxes[identity].misses(self._departed):
                    self._missed(peer)

    def watch(self, peers: Iterable[WorkerId]) -> None:
        """Have links with these, so that their end is noticed."""
        for peer in peers:
            self._watch(peer)

    def _watch(self, peer: WorkerId) -> None:
        if peer not in self._watched:
            with suppress(LinkClosed):  # it is about to be removed, or is this process
                self._links.watch(peer)
                self._watched.add(peer)

    def _missed(self, peer: WorkerId) -> None:
        self._inbox.put(PeerClosed(peer=peer, error=LinkClosed(f"worker {peer} left while it was still needed")))

    def close(self, deadline_s: float) -> None:
        """End links and thread; whoever waits gets LinkClosed, and futures of what is under way do. Any thread."""
        with self._changed:
            if self._closed:
                return
            self._closed = True
            self._changed.notify_all()
        self._failure = self._failure or LinkClosed("the endpoint is closed")
        self._inbox.put(Woken())
        self._fail_all(self._failure)
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(deadline_s)
        held = self._driving.acquire(timeout=deadline_s)
        try:
            self._links.close(deadline_s)
        finally:
            if held:
                self._driving.release()

    def statistics(self) -> LinkStatistics:
        """Counts of the links."""
        return self._links.statistics()

    # ------------------------------------------------------------------ communicators

    def communicator(self, name: str, members: Sequence[WorkerId], *, epoch: int = 0) -> Communicator:
        """A new one; all members make it under the same name, in any order with others.

        epoch: that in which the other members add this process by `edit`; 0 where all begin together.
        """
        if self.me not in members or len(set(members)) != len(members):
            raise ConfigError(f"members of {name!r} are {list(members)}: must be distinct and include {self.me}")
        identity = int.from_bytes(sha256(name.encode()).digest()[:8], "little")
        with self._state:
            if identity in self._communicators:
                raise ConfigError(f"there is a communicator {name!r} already: give each a name of its own")
            found = Communicator(
                name,
                identity,
                me=self.me,
                members=members,
                transmit=self._transmit,
                agree_s=self._options.agree_s,
                missed=self._missed,
                watch=self._watch,
                watched=self._watched,
                finished=self._ended,
            )
            self._communicators[identity] = found
            self._mailboxes[identity] = Mailbox(found)
            for peer in self._departed:
                found.depart(peer)
            if epoch:
                found.join(epoch, time.monotonic())
            late = tuple(self._late)
            self._late.clear()
            for frame in late:
                self._take_frame(frame)
        return found

    def fail(self, communicator: Communicator, error: ElasWaveError) -> None:
        """Every operation fails with this until the next edit."""
        with self._state:
            communicator.fail(error)
        self._settle()

    def drop(self, communicator: Communicator) -> None:
        """Forget a communicator; what is under way in it, and what is begun later, fails with LinkClosed."""
        with self._state:
            if self._communicators.get(communicator.identity) is not communicator:
                return
            gone = LinkClosed(f"the group {communicator.name} was destroyed while it was in use")
            communicator.fail(gone)
            self._mailboxes[communicator.identity].close(gone)
        self._settle()
        self._inbox.put(Woken())  # who drives may wait for just this
        with self._state:
            if self._communicators.get(communicator.identity) is communicator:
                del self._communicators[communicator.identity], self._mailboxes[communicator.identity]

    def retire(self, communicator: Communicator) -> None:
        """The same, but for agreements: members that are behind can still find out what has succeeded here."""
        with self._state:
            gone = LinkClosed(f"the group {communicator.name} was destroyed while it was in use")
            communicator.retire(gone)
            self._mailboxes[communicator.identity].close(gone)
        self._settle()
        self._inbox.put(Woken())

    def edit(
        self, communicator: Communicator, epoch: int, remove: Iterable[WorkerId], add: Iterable[WorkerId] = ()
    ) -> EditReport:
        """Change members in place; the agreement on the last operation goes on while somebody drives. Any thread.

        Nothing happens where the communicator was dropped.
        """
        with self._state:
            if self._communicators.get(communicator.identity) is not communicator:
                return EditReport(epoch=communicator.epoch, removed=(), added=())
            report = communicator.edit(epoch, remove, add, time.monotonic())
            self._mailboxes[communicator.identity].edited()
        self._settle()
        if self._driver != threading.get_ident():
            self._inbox.put(Woken())  # what is awaited may have ended here, or be something else now
        return report

    def await_agreement(self, communicator: Communicator, deadline: float) -> None:
        """Wait for the agreement that an edit has begun; after DeadlineExceeded first for the edit.

        Raises what operations fail with otherwise.
        """
        before = communicator.failure  # mended by the next edit only
        if before is not None and not isinstance(before, DeadlineExceeded):
            raise before

        def is_done() -> bool:
            return communicator.agreed or communicator.failure not in (None, before)

        what = "the agreement of" if before is None else "an edit that removes who is missing from"
        self.drive(is_done, deadline, f"{what} {communicator.name}")
        failure = communicator.failure
        if failure is not None:
            raise failure

    def acknowledge(self, communicator: Communicator) -> None:
        """Let operations work again after an edit; they wait for the agreement. Raises what else they fail with."""
        with self._state:
            if communicator.failure is not None:
                raise communicator.failure
            communicator.acknowledge()

    def membership(self, communicator: Communicator) -> tuple[int, tuple[WorkerId, ...]]:
        """Epoch and members of one moment. Raises why operations fail now, if they do."""
        with self._state:
            communicator.check()
            return communicator.epoch, communicator.members

    # ------------------------------------------------------------------ operations

    def start(self, communicator: Communicator, operation: Operation) -> None:
        """Start an operation; returns at once. Somebody has to wait for it, or `attend`."""
        with self._state:
            communicator.submit(operation)
            # Who drives may sleep until a message comes, and of an operation in memory none ever does.
            unheard = self._driving.locked() and (
                communicator.awaited_memory() is not None or operation.deadline < self._until
            )
        if unheard:
            self._inbox.put(Woken())
        self._settle()

    def limit(self, operation: Operation, deadline: float) -> None:
        """Have an operation fail at `deadline` if it has not ended before. Any thread."""
        with self._state:
            if operation.finished or operation.deadline <= deadline:
                return
            operation.deadline = deadline
        self._inbox.put(Woken())  # who drives may sleep beyond it

    def when_ended(self, operation: Operation, callback: Callback) -> None:
        """Call `callback` once the operation has ended, in the thread that drives then; at once if it has."""
        with self._state:
            if not operation.finished:
                operation.callbacks.append(callback)
                return
        callback(operation)

    def poll(self) -> None:
        """Handle what is here without waiting, unless another thread drives anyway."""
        if self._take_seat():
            try:
                self._turn(time.monotonic())
            finally:
                self._leave_seat()

    def wake(self) -> None:
        """Have whoever drives look again at what it waits for. Any thread."""
        self._inbox.put(Woken())

    def wait(self, operation: Operation) -> None:
        """Until it has ended; its error is raised. It ends at its own deadline at the latest."""
        self.drive(lambda: operation.finished, operation.deadline + self._options.agree_s, operation.name)
        operation.raise_error()

    def send(self, communicator: Communicator, rank: int, tag: int, tensor: Tensor) -> None:
        """Send a flat tensor to a rank; it is copied where it has to wait."""
        with self._state:
            communicator.check()
            meta = _MESSAGE_META.pack(communicator.identity, communicator.epoch, tag)
            member = communicator.members[rank]
            if member == self.me:
                self._mailboxes[communicator.identity].arrived(
                    self.me, communicator.epoch, tag, tensor.clone().view(torch.uint8)
                )
                self._inbox.put(Woken())
                return
        payload = tensor.view(torch.uint8).numpy() if tensor.numel() else None
        with suppress(LinkClosed):  # see `_transmit`
            self._links.send(member, MESSAGE, meta, payload, copy=True)

    def expect(self, communicator: Communicator, rank: int | None, tag: int) -> Awaited:
        """Begin to wait for a message from a rank (None: any)."""
        with self._state:
            communicator.check()
            mailbox = self._mailboxes[communicator.identity]
            awaited = mailbox.expect(rank, tag)
            senders = communicator.members if awaited.member is None else (awaited.member,)
            for peer in senders if awaited.payload is None else ():
                self._watch(peer)
            for peer in mailbox.misses(self._departed):
                self._missed(peer)
        return awaited

    def is_here(self, communicator: Communicator, awaited: Awaited) -> bool:
        """Whether `receive` would return, or raise, at once."""
        mailbox = self._mailboxes.get(communicator.identity)
        return mailbox is None or mailbox.ready(awaited)

    def receive(self, communicator: Communicator, awaited: Awaited, like: Tensor, deadline: float) -> int:
        """Wait for the message, copy it into `like`, a flat tensor; returns the rank of its sender."""
        with self._state:
            mailbox = self._mailboxes.get(communicator.identity)
        if mailbox is None:
            communicator.check()
            raise LinkClosed(f"the group {communicator.name} was destroyed")
        member = awaited.member
        known = communicator.members
        whom = "any rank" if member not in known else f"rank {known.index(member)} (worker {member})"
        try:
            self.drive(lambda: mailbox.ready(awaited), deadline, f"a message of {whom} in {communicator.name}")
            return mailbox.take(awaited, like)
        finally:
            with self._state:
                mailbox.give_up(awaited)

    def notify(self, peer: WorkerId, content: bytes) -> None:
        """Send a notice outside any communicator; a peer that cannot be reached gets none."""
        with suppress(LinkClosed):
            self._links.send(peer, NOTICE, b"", content, copy=True)

    def _transmit(self, member: WorkerId, communicator: Communicator, number: int, tensor: Tensor) -> None:
        meta = _OPERATION_META.pack(communicator.identity, communicator.epoch, number)
        payload = tensor.view(torch.uint8).numpy() if tensor.numel() else None
        # A member that was forgotten is about to be removed from the communicator: nothing is lost by not sending.
        try:
            self._links.send(member, OPERATION, meta, payload, copy=communicator.sends_kept)
        except LinkClosed:
            return

    # ------------------------------------------------------------------ driving

    def drive(self, is_done: Callable[[], bool], deadline: float, what: str) -> None:
        """Run everything until `is_done()`. Raises DeadlineExceeded, and what the links failed with."""
        while not is_done():
            now = time.monotonic()
            self._check(now, deadline, what)
            if self._take_seat():
                try:
                    while not is_done() and not self._calls:
                        if now >= deadline or self._failure is not None:
                            self._check(now, deadline, what)
                        now = self._turn(deadline)
                finally:
                    self._leave_seat()
            else:
                self._sleep(lambda: not self._driving.locked() or is_done(), deadline)

    def _take_seat(self) -> bool:
        """Whether this thread is the one to drive from here on; then it has to leave the seat."""
        if not self._driving.acquire(blocking=False):
            return False
        self._driver = threading.get_ident()
        return True

    def _leave_seat(self) -> None:
        """Somebody else may drive. Calls the callbacks of what has ended."""
        self._inbox.leave()
        self._driver = 0
        self._driving.release()
        self._wake_sleepers()
        self._call()

    def _sleep(self, is_over: Callable[[], bool], deadline: float) -> None:
        """Until the next change, while another thread drives; not at all where `is_over` says so already."""
        with self._changed:
            self._sleepers += 1
            try:
                if not is_over():
                    self._changed.wait(max(0.0, deadline - time.monotonic()))
            finally:
                self._sleepers -= 1

    def _wake_sleepers(self) -> None:
        """Something has changed. Who is about to sleep either is counted already, or looks after this change."""
        if self._sleepers:
            with self._changed:
                self._changed.notify_all()

    def _check(self, now: float, deadline: float, what: str) -> None:
        if self._failure is not None:
            raise self._failure
        if now >= deadline:
            raise DeadlineExceeded(f"the timeout ended while {what} was awaited")

    def _turn(self, deadline: float) -> float:
        """Wait for something and handle it; returns the time. This thread has the seat."""
        until, awaited = deadline, list[Await]()
        with self._state:
            for found in self._communicators.values():
                outlook = found.outlook()
                if outlook is not None:
                    until = min(until, outlook[0])
                    if outlook[1] is not None:
                        awaited.append(outlook[1])
            self._until = until
        if awaited:
            # Frames come in by the links' own thread meanwhile; among them the news that ends this wait for good.
            self._inbox.wait_with(awaited, until)
        else:
            self._inbox.wait(until, stay=True)
        items = self._inbox.take_all()
        news = self._take(items) if items else []
        now = time.monotonic()
        if awaited or now >= until:
            with self._state:
                for found in self._communicators.values():
                    found.look()
                    found.expire(now)
        if items:
            self._wake_sleepers()  # what another thread waits for need not be an operation
        if news:
            self._inbox.leave()  # who is told may wait for others
            try:
                for item in news:
                    self._tell(item)
            except ElasWaveError as error:
                self._fail_all(error)
                raise
        self._settle()
        return now

    def _take(self, items: list[LinkItem | Woken]) -> list[LinkItem | Woken]:
        """Handle frames of communicators; returns all else."""
        news: list[LinkItem | Woken] = []
        with self._state:
            for item in items:
                if isinstance(item, Received) and item.kind != NOTICE:
                    if item.payload.size >= LARGE_BYTES:
                        self._inbox.leave()
                    self._take_frame(item)
                elif not isinstance(item, Woken):
                    news.append(item)
        return news

    def _tell(self, item: LinkItem | Woken) -> None:
        """What others have to know, without the lock."""
        match item:
            case LinksFailed():
                self._failure = item.error
            case Received(kind=kind) if kind == NOTICE:
                try:
                    self._on_notice(item.peer, item.payload.tobytes())
                except ProtocolError as error:
                    self._malformed(item.peer, error)
            case PeerClosed():
                self._on_lost(item)
            case ConnectionRefused():
                pass  # counted by the links; an intruder must not be able to fill a log
            case _:
                pass

    def _take_frame(self, frame: Received) -> None:
        try:
            if frame.kind == OPERATION:
                identity, epoch, number = _OPERATION_META.unpack(frame.meta)
                communicator = self._communicators.get(identity)
                if communicator is not None:
                    communicator.receive(frame.peer, epoch, number, frame.payload)
                    return
            elif frame.kind == MESSAGE:
                identity, epoch, tag = _MESSAGE_META.unpack(frame.meta)
                mailbox = self._mailboxes.get(identity)
                if mailbox is not None:
                    mailbox.arrived(frame.peer, epoch, tag, torch.from_numpy(frame.payload))
                    return
            else:
                raise ProtocolError(f"worker {frame.peer} sent a frame of unknown kind {frame.kind}")
            self._late.append(frame)
        except (struct.error, ProtocolError) as error:
            self._malformed(frame.peer, error)

    def _malformed(self, peer: WorkerId, error: Exception) -> None:
        self.forget(peer)
        self._inbox.put(PeerClosed(peer=peer, error=ProtocolError(f"malformed frame: {error}")))

    def _settle(self) -> None:
        """Tell whoever waits for operations that have ended."""
        if self._ended:
            with self._state:
                for operation in self._ended:
                    self._calls.extend([(callback, operation) for callback in operation.callbacks])
                self._ended.clear()
            self._wake_sleepers()
        if self._calls and self._driver != threading.get_ident():
            self._call()

    def _call(self) -> None:
        """Call the callbacks of what has ended. Without the seat: they may wait for other operations."""
        while self._calls:
            try:
                callback, operation = self._calls.popleft()
            except IndexError:
                return  # another thread was faster
            callback(operation)

    # ------------------------------------------------------------------ what nobody waits for

    def attend(self) -> None:
        """Have a thread drive what is under way while nobody waits for it."""
        with self._changed:
            # Who asks for it in a callback may go on to wait for a future, of which that thread hears nothing.
            if self._thread in (None, threading.current_thread()) and not self._closed:
                # A daemon: a process that ends without close() must not hang in its exit.
                self._thread = threading.Thread(target=self._run, name="elaswave-communicators", daemon=True)
                self._thread.start()
            self._changed.notify_all()

    def _run(self) -> None:
        """Drive while something is under way and nobody else drives."""
        me = threading.current_thread()

        def is_over() -> bool:
            return self._closed or self._thread is not me

        while True:
            with self._changed:
                self._sleepers += 1
                try:
                    self._changed.wait_for(lambda: is_over() or (self._busy() and not self._driving.locked()))
                finally:
                    self._sleepers -= 1
                if is_over():
                    return
            try:
                self.drive(
                    lambda: is_over() or not self._busy(), time.monotonic() + 3600.0, "operations without a waiter"
                )
            except DeadlineExceeded:
                continue  # of this drive; operations have deadlines of their own
            except ElasWaveError as error:
                self._fail_all(error)

    def _fail_all(self, error: ElasWaveError) -> None:
        """The links failed, or who is told of losses: futures that nobody waits for must not be left hanging."""
        with self._state:
            for communicator in self._communicators.values():
                communicator.fail(error)
        self._settle()

    def _busy(self) -> bool:
        return any(not found.idle for found in tuple(self._communicators.values()))
