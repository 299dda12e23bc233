"""Mailbox: messages between two ranks of a communicator, matched by sender and tag in the order of sending."""

from collections import deque
from dataclasses import dataclass

from torch import Tensor

from elaswave.comm.communicator import Communicator
from elaswave.core.ids import WorkerId
from elaswave.errors import ElasWaveError, EpochChanged, ProtocolError


@dataclass(slots=True, eq=False, weakref_slot=True)
class Awaited:
    """One receive. member None: any. sender: rank and id of who has sent the payload, when that came."""

    member: WorkerId | None
    tag: int
    epoch: int
    payload: Tensor | None = None
    sender: tuple[int, WorkerId] | None = None


class Mailbox:
    """Messages of one communicator. The endpoint's lock is held, except for `ready` and `take`."""

    def __init__(self, communicator: Communicator) -> None:
        self._communicator = communicator
        self._messages: dict[tuple[WorkerId, int, int], deque[Tensor]] = {}
        self._awaited: list[Awaited] = []  # of this epoch, in the order of their beginning, without a payload
        self._closed: ElasWaveError | None = None

    def arrived(self, peer: WorkerId, epoch: int, tag: int, payload: Tensor) -> None:
        """A message; of an older epoch it is dropped, of a newer one it waits."""
        if epoch < self._communicator.epoch or self._closed is not None:
            return
        self._messages.setdefault((peer, epoch, tag), deque()).append(payload)
        self._match()

    def expect(self, rank: int | None, tag: int) -> Awaited:
        """Begin to wait; receives of the same sender and tag are served in this order."""
        member = None if rank is None else self._communicator.members[rank]
        awaited = Awaited(member, tag, self._communicator.epoch)
        self._awaited.append(awaited)
        self._match()
        return awaited

    def _match(self) -> None:
        epoch, known = self._communicator.epoch, self._communicator.members
        for awaited in self._awaited:
            for member in known if awaited.member is None else (awaited.member,):
                found = self._messages.get((member, epoch, awaited.tag))
                if found:
                    awaited.sender = known.index(member), member
                    awaited.payload = found.popleft()
                    break
        self._awaited = [awaited for awaited in self._awaited if awaited.payload is None]

    def misses(self, departed: set[WorkerId]) -> set[WorkerId]:
        """Those of `departed` without whom some receive cannot end: no message of theirs is here, none will come."""
        missed: set[WorkerId] = set()
        for awaited in self._awaited:
            communicator = self._communicator
            others = set(communicator.members) - {communicator.me}
            senders = others if awaited.member is None else {awaited.member}
            missed |= senders if senders <= departed else set()
        return missed

    def edited(self) -> None:
        """The communicator has a new epoch."""
        epoch = self._communicator.epoch
        self._messages = {key: found for key, found in self._messages.items() if key[1] >= epoch}
        self._awaited = [awaited for awaited in self._awaited if awaited.epoch == epoch]
        self._match()

    def close(self, error: ElasWaveError) -> None:
        """Nothing comes any more: who waits gets this error."""
        self._closed = error
        self._messages.clear()
        self._awaited.clear()

    def ready(self, awaited: Awaited) -> bool:
        """A message is here, or none can come any more."""
        ended = self._closed is not None or awaited.epoch != self._communicator.epoch
        return ended or awaited.payload is not None

    def take(self, awaited: Awaited, like: Tensor) -> int:
        """Copy the message into `like`; returns the rank that its sender had. ProtocolError for another length.

        Raises EpochChanged where none has come before an edit, and what the mailbox was closed with.
        """
        payload = awaited.payload
        if payload is None or awaited.sender is None:
            changed = f"{self._communicator.name} changed while a message was awaited: call reconfigure()"
            raise self._closed or EpochChanged(changed)
        rank, member = awaited.sender
        expected = like.numel() * like.element_size()
        if payload.numel() != expected:
            raise ProtocolError(f"worker {member} sent {payload.numel()} bytes; this receive expects {expected}")
        if expected:  # a tensor without elements has no stride that could be viewed as another dtype
            like.copy_(payload.view(like.dtype))
        return rank

    def give_up(self, awaited: Awaited) -> None:
        """Wait no longer."""
        if awaited in self._awaited:
            self._awaited.remove(awaited)
