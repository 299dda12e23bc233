"""Communicator: ordered members, an epoch, and a queue of operations; edited in place."""

from collections import deque
from collections.abc import Callable, Iterable, Sequence, Set
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from elaswave.comm.collectives.agreement import Standing, agree, hand_over
from elaswave.comm.collectives.commands import NO_ANSWER, Await, Collective, Held, Placed, Receive, Send
from elaswave.comm.kept_result import KeptResult
from elaswave.comm.operation import Operation
from elaswave.core.ids import WorkerId
from elaswave.errors import ConfigError, DeadlineExceeded, ElasWaveError, EpochChanged, ProtocolError

AGREEMENT = (1 << 64) - 1
"""Number of the one operation by which the members of a new epoch agree on the last one of the epoch before."""

EPOCHS_AHEAD = 1024
"""How far a peer can be ahead of this rank's epoch; more is nonsense that must not be stored."""

NOTHING_MISSED = 1 << 40
"""What a joining rank says about the operations before it: more than any number of them."""

KEEP_LIMIT_BYTES = 1 << 20
"""Results that all ranks share, up to this, are kept till the next operation."""

_UNNUMBERED = -1
"""Of an operation that was started after an edit was acknowledged, and before the members have agreed."""

_STALE = -2
"""Of such a one when the next edit came first: it fails."""

NO_STAKE = 1 << 60
"""Stake of a rank that has nothing to go on with; more than any other."""

Transmit = Callable[[WorkerId, "Communicator", int, Tensor], None]
"""Sends a flat tensor to a member as part of the operation of this number."""

Missed = Callable[[WorkerId], None]
"""Told of a member that has left in order while more of it is awaited."""

Watch = Callable[[WorkerId], None]
"""Told of a member that sends next: its end has to be noticed, although nothing may ever have been sent to it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EditReport:
    """What an edit changed."""

    epoch: int
    removed: tuple[WorkerId, ...]
    added: tuple[WorkerId, ...]


class Communicator:
    """One rank's part of a group. All methods are called with the endpoint's lock held, except the properties.

    After an edit it is broken: every operation raises EpochChanged, on all ranks from the same one on, until
    `acknowledge`. What is started after that runs once the members have agreed. Operations run in the order in which
    they were started; numbers are never used twice for another one.
    """

    def __init__(
        self,
        name: str,
        identity: int,
        *,
        me: WorkerId,
        members: Sequence[WorkerId],
        transmit: Transmit,
        agree_s: float,
        missed: Missed | None = None,
        watch: Watch | None = None,
        watched: Set[WorkerId] = frozenset(),
        finished: list[Operation] | None = None,
    ) -> None:
        """identity: the same on all members, different for other communicators. agree_s: seconds for an agreement.

        watched: of whom `watch` needs not be told. finished: where what has ended is put; None: a list of its own.
        """
        self.name = name
        self.identity = identity
        self.me = me
        self.members = tuple(members)
        self.epoch = 0
        self.broken = False
        self.agreed = True
        self.failure: ElasWaveError | None = None
        """Why operations fail until the next edit, other than by one: members may be at different operations."""
        self._retired: ElasWaveError | None = None
        self.stake: Callable[[], int] = _no_stake
        """Asked when an edit begins: what of its user's the members are to find the maximum of while they agree."""
        self.stakes = NO_STAKE
        """That maximum, of the last agreement."""
        self.stale_frames = 0
        self._transmit = transmit
        self._missed = missed
        self._watch = watch
        self._watched = watched
        self._departed: set[WorkerId] = set()
        self._agree_s = agree_s
        self._queue: deque[Operation] = deque()
        self._agreement: Operation | None = None
        self._completed = 0
        self._next = 1
        self._joined = False
        self._kept = KeptResult()
        self._arrived: dict[tuple[int, int, WorkerId], deque[NDArray[np.uint8]]] = {}
        self.sends_kept = False
        """The operation that sends now is not acknowledged: it may end before what it has sent has left."""
        self.finished: list[Operation] = finished if finished is not None else []
        """Ended since the endpoint looked last; it calls their callbacks."""

    @property
    def rank(self) -> int:
        """Of this process; raises EpochChanged where it was removed."""
        members = self.members  # another thread may edit meanwhile
        if self.me not in members:
            raise EpochChanged(f"this process (worker {self.me}) was removed from {self.name} in epoch {self.epoch}")
        return members.index(self.me)

    @property
    def size(self) -> int:
        """Number of members."""
        return len(self.members)

    @property
    def idle(self) -> bool:
        """Nothing is under way."""
        return not self._queue and self._agreement is None

    @property
    def unended(self) -> bool:
        """Operations are under way, or waiting for their turn: they may yet write to their tensors."""
        return bool(self._queue)

    @property
    def next_number(self) -> int:
        """That of the operation that is started next."""
        return self._next

    @property
    def completed(self) -> int:
        """Number of the last operation that has succeeded here."""
        return self._completed

    # ------------------------------------------------------------------ operations

    def submit(self, operation: Operation) -> None:
        """Queue it; where the communicator is broken it fails, once the members have agreed that it does."""
        failure = self._retired or self.failure
        if failure is not None:
            self._end(operation, failure)
            return
        if self.broken and self.agreed:
            self._end(operation, self._changed())
            return
        self._queue.append(operation)
        if not self.broken and not self.agreed:
            operation.number = _UNNUMBERED
            return
        self._number(operation)
        if self._queue[0] is operation and not self.broken:
            self._advance(operation, None)

    def _number(self, operation: Operation) -> None:
        operation.number = self._next
        self._next += 1

    def receive(self, peer: WorkerId, epoch: int, number: int, payload: NDArray[np.uint8]) -> None:
        """A frame of an operation. Of an older epoch it is dropped, of a newer one it waits for the edit.

        Raises ProtocolError for what no member can have sent. Of a length that the operation here does not expect, it
        is the user's error: the operation fails with it, and nobody is taken for lost.
        """
        if epoch == self.epoch:
            current = self._current()
            awaited = current.awaited if current is not None and current.number == number else None
            if current is not None and isinstance(awaited, Receive) and self.members[awaited.rank] == peer:
                try:
                    self._advance(current, self._read(payload, number, awaited))
                except ProtocolError as error:
                    self.fail(error)
                return
        elif epoch < self.epoch:
            self.stale_frames += 1
            return
        elif epoch > self.epoch + EPOCHS_AHEAD:
            raise ProtocolError(f"worker {peer} sent a frame of epoch {epoch}; {self.name} is at {self.epoch}")
        self._arrived.setdefault((epoch, number, peer), deque()).append(payload)

    def _current(self) -> Operation | None:
        if self._agreement is not None:
            return self._agreement
        return self._queue[0] if self._queue and not self.broken else None

    def outlook(self) -> tuple[float, Await | None] | None:
        """When something has to be expired, and what is awaited in memory; None: nothing is under way."""
        if self._agreement is None and not self._queue:
            return None
        if self._agreement is None and len(self._queue) == 1:
            return self._queue[0].deadline, self.awaited_memory()
        return min(map(_deadline_of, self._due())), self.awaited_memory()

    def awaited_memory(self) -> Await | None:
        """What the current operation waits for in memory: nobody sends a message of it."""
        current = self._current()
        return current.awaited if current is not None and isinstance(current.awaited, Await) else None

    def look(self) -> None:
        """Go on if what is awaited in memory has come."""
        current = self._current()
        if current is not None and isinstance(current.awaited, Await) and current.awaited.is_ready():
            self._advance(current, None)

    def _take(self, number: int, awaited: Receive) -> Tensor | None:
        key = (self.epoch, number, self.members[awaited.rank])
        arrived = self._arrived.get(key)
        if not arrived:
            return None
        payload = arrived.popleft()
        if not arrived:
            del self._arrived[key]
        return self._read(payload, number, awaited)

    def _read(self, payload: NDArray[np.uint8], number: int, awaited: Receive) -> Tensor:
        like = awaited.like
        expected = like.nbytes
        if payload.size != expected:
            raise ProtocolError(
                f"worker {self.members[awaited.rank]} sent {payload.size} bytes in operation {number} of "
                f"{self.name}; this rank expects {expected}: all ranks must call the same operations with the same "
                "shapes"
            )
        return torch.frombuffer(payload, dtype=like.dtype) if expected else torch.empty(0, dtype=like.dtype)

    def _advance(self, operation: Operation, answer: Tensor | None) -> None:
        """Run the operation, and those behind it, until one waits for something that is not here, or fails."""
        while self._run(operation, answer):
            following = self._succeed(operation)
            if following is None:
                return
            operation, answer = following, None

    def _run(self, operation: Operation, answer: Tensor | None) -> bool:
        """Run one operation as far as it goes; whether it has ended well."""
        operation.awaited = None
        self.sends_kept = operation.keep or operation.number == AGREEMENT
        go_on = operation.collective.send
        try:
            while True:
                command = go_on(NO_ANSWER if answer is None else answer)
                answer = None
                match command:
                    case Receive():
                        answer = self._take(operation.number, command) if self._arrived else None
                        if answer is None:
                            self._await(operation, command)
                            return False
                    case Send():
                        self._transmit(self.members[command.rank], self, operation.number, command.tensor)
                    case Placed():
                        if operation.keep:
                            operation.placed.append(command)
                    case Held():
                        operation.held = True
                    case Await():
                        if not command.is_ready():
                            self._await(operation, command)
                            return False
        except StopIteration:
            return True
        except ElasWaveError as error:
            self.fail(error)
            return False
        except Exception as error:  # of torch; whoever happens to drive has nothing to do with it
            self.fail(_refused(operation, self.name, error))
            return False

    def _await(self, operation: Operation, command: Receive | Await) -> None:
        operation.awaited = command
        member = self.members[command.rank]
        if member not in self._watched and self._watch is not None and isinstance(command, Receive):
            self._watch(member)
        if self._departed:
            self._check_departed(operation)

    def depart(self, member: WorkerId) -> None:
        """It has left in order, and all that it had sent is here: it is missed only where more of it is awaited.

        It may have what the operation under way gives, and this rank may yet get that from others.
        """
        self._departed.add(member)
        current = self._current()
        if current is not None:
            self._check_departed(current)

    def _check_departed(self, operation: Operation) -> None:
        if operation.awaited is None or self._missed is None:
            return
        member = self.members[operation.awaited.rank]
        if member in self._departed:
            self._missed(member)

    def _succeed(self, operation: Operation) -> Operation | None:
        """The operation that may run now."""
        if operation.number == AGREEMENT:
            self._end(operation, None)
        else:
            self._complete(operation)
        return self._queue[0] if self._queue else None

    def _complete(self, operation: Operation) -> None:
        self._queue.popleft()
        self._completed = operation.number
        self._kept.replace(operation.result if operation.keep else None, operation.placed)
        self._end(operation, None)

    def fail(self, error: ElasWaveError) -> None:
        """What is under way cannot go on for another reason than an edit: nor can what follows, until the next edit."""
        if self._agreement is not None:
            agreement, self._agreement = self._agreement, None
            self._end(agreement, error)
        self.broken = True
        self.agreed = False
        self.failure = error
        self._end_all(error)

    def retire(self, error: ElasWaveError) -> None:
        """This rank uses it no more: operations fail. What it has completed it still tells in agreements."""
        self._retired = error
        self._end_all(error)

    def _end_all(self, error: ElasWaveError) -> None:
        for waiting in self._queue:
            self._end(waiting, error)
        self._queue.clear()

    def _end(self, operation: Operation, error: ElasWaveError | None) -> None:
        operation.error = error
        operation.awaited = None
        operation.collective.close()
        if operation.before_end is not None:
            try:
                operation.before_end(operation)
            except Exception as failed:  # of torch; whoever happens to drive has nothing to do with it
                operation.error = _refused(operation, self.name, failed)
        operation.finished = True
        self.finished.append(operation)

    # ------------------------------------------------------------------ deadlines

    def expire(self, now: float) -> None:
        """Fail what has waited beyond its deadline, and with it all that is under way."""
        late = min(self._due(), key=_deadline_of, default=None)  # not always the oldest: timeouts differ
        if late is None or now < late.deadline:
            return
        current = self._current()
        awaited = None if current is None else current.awaited
        member = None if awaited is None else self.members[awaited.rank]
        whom = "an edit" if awaited is None else f"rank {awaited.rank} (worker {member})"
        self.fail(DeadlineExceeded(f"{late.name} of {self.name}: its timeout ended while it waited for {whom}"))

    def _due(self) -> Iterable[Operation]:
        """What has a deadline: what an edit has broken off has none but the agreement's."""
        if self._agreement is None:
            return self._queue
        fresh = (operation for operation in self._queue if operation.number == _UNNUMBERED)
        return (self._agreement, *fresh)

    # ------------------------------------------------------------------ edits

    def edit(self, epoch: int, remove: Iterable[WorkerId], add: Iterable[WorkerId], now: float) -> EditReport:
        """Change members in place and agree with them; nothing happens where `epoch` is not newer.

        The last member takes the place of a removed one, so that few neighbours in rings and trees change; added ones
        stand at the end. `remove` is in the order of removal, the same for all members, and may repeat earlier ones:
        who hears of two losses at once gets the same order as who hears of one after the other.
        """
        if epoch <= self.epoch:
            return EditReport(epoch=self.epoch, removed=(), added=())
        gone = tuple(worker for worker in remove if worker in self.members)
        new = tuple(worker for worker in add if worker not in self.members)
        self.members = without(self.members, gone) + new
        self.epoch = epoch
        self.broken = True
        self.agreed = False
        self.failure = None
        self._arrived = {key: found for key, found in self._arrived.items() if key[0] >= epoch}
        if self._agreement is not None:
            superseded, self._agreement = self._agreement, None
            superseded.collective.close()
        for operation in self._queue:
            operation.awaited = None
            if operation.number == _UNNUMBERED:
                operation.number = _STALE
        if self.me in self.members:
            self._begin_agreement(now)
        else:
            self._settle(self._completed)
        return EditReport(epoch=epoch, removed=gone, added=new)

    def join(self, epoch: int, now: float) -> None:
        """Take part from this epoch on, in which the others have added this rank; it has missed nothing."""
        self.epoch = epoch
        self.broken = True
        self.agreed = False
        self._joined = True
        self._begin_agreement(now)

    def _begin_agreement(self, now: float) -> None:
        head = self._queue[0] if self._queue else None
        rank, size = self.rank, self.size
        mine = Standing(
            completed=self._completed,
            holder=rank,
            kept_bytes=self._kept.nbytes,
            reachable=NOTHING_MISSED if self._joined else self._completed + (head is not None and head.held),
            stake=self.stake(),
        )
        operation = Operation("agreement", self._agree(rank, size, mine), now + self._agree_s, None, keep=False)
        operation.number = AGREEMENT
        self._agreement = operation
        self._advance(operation, None)

    def _agree(self, rank: int, size: int, mine: Standing) -> Collective:
        agreed = yield from agree(rank, size, mine)
        whole = agreed.whole
        self.stakes = whole.stake
        if whole.missing(whole.completed):
            kept = self._handed_over(whole)
            if kept.numel():
                yield from hand_over(rank, agreed, kept)
        self._settle(whole.completed)

    def _handed_over(self, whole: Standing) -> Tensor:
        """Where the result of the last operation that somebody has completed is here, or where it belongs, as bytes."""
        head = self._queue[0] if self._queue and self._queue[0].number == whole.completed else None
        missed = head.result if head is not None and not head.held else None
        fits = missed is None or missed.nbytes == whole.kept_bytes
        if not (fits and 0 <= whole.kept_bytes <= KEEP_LIMIT_BYTES):
            raise ProtocolError(
                f"rank {whole.holder} hands over a result of {whole.kept_bytes} bytes for operation {whole.completed} "
                f"of {self.name}: kept are at most {KEEP_LIMIT_BYTES}, and all ranks must call the same operations "
                "with the same shapes"
            )
        if missed is not None:
            return missed.view(torch.uint8)
        if self._completed == whole.completed:
            return self._kept.whole()
        return torch.empty(whole.kept_bytes, dtype=torch.uint8)  # to be passed on

    def _settle(self, last: int) -> None:
        """All members know: operations up to `last` have succeeded, later ones fail."""
        self._agreement = None
        self.agreed = True
        head = self._queue[0] if self._queue else None
        if head is not None and head.number == last:
            if not head.held and not head.keep and head.catch_up is not None:
                head.catch_up()
            self._complete(head)
        self._completed = max(self._completed, last)
        self._joined = False
        self._next = self._completed + 1
        begun, self._queue = self._queue, deque()
        for operation in begun:
            if operation.number == _UNNUMBERED:
                self._number(operation)
                self._queue.append(operation)
            else:
                self._end(operation, self._changed())

    def check(self) -> None:
        """Raise why operations fail now, if they do: ranks may stand for others than the user knows of."""
        if self._retired is not None:
            raise self._retired
        if self.broken:
            raise self.failure or self._changed()

    def acknowledge(self) -> None:
        """The user knows of the edit: operations work again, once members have agreed.

        Raises EpochChanged where this process was removed.
        """
        _ = self.rank
        self.broken = False

    def _changed(self) -> EpochChanged:
        return EpochChanged(
            f"{self.name} changed: epoch {self.epoch}, {self.size} members; call reconfigure() and repeat the step"
        )


def _refused(operation: Operation, where: str, error: Exception) -> ConfigError:
    refused = ConfigError(f"{operation.name} of {where} cannot work on these tensors: {error}")
    refused.__cause__ = error
    return refused


def _deadline_of(operation: Operation) -> float:
    return operation.deadline


def _no_stake() -> int:
    return NO_STAKE


def without(members: tuple[WorkerId, ...], gone: Iterable[WorkerId]) -> tuple[WorkerId, ...]:
    """Members after, one by one, the last one has taken the place of one that is gone."""
    left = list(members)
    for worker in gone:
        place = left.index(worker)
        last = left.pop()
        if place < len(left):
            left[place] = last
    return tuple(left)
