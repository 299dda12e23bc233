"""Mailbox: messages between two ranks of a communicator, matched by sender and tag in the order of sending."""

from collections import deque
from dataclasses import dataclass

from torch import Tensor

from elaswave.comm.communicator import Communicator
from elaswave.core.ids import WorkerId
from elaswave.errors import EpochChanged, ProtocolError


@dataclass(slots=True, eq=False)
class Awaited:
    """One receive. member None: any."""

    member: WorkerId | None
    tag: int
    epoch: int
    payload: tuple[WorkerId, Tensor] | None = None


class Mailbox:
    """Messages of one communicator. The endpoint's lock is held, except for `ready` and `take`."""

    def __init__(self, communicator: Communicator) -> None:
        self._communicator = communicator
        self._messages: dict[tuple[WorkerId, int, int], deque[Tensor]] = {}
        self._awaited: list[Awaited] = []

    def arrived(self, peer: WorkerId, epoch: int, tag: int, payload: Tensor) -> None:
        """A message; of an older epoch it is dropped, of a newer one it waits."""
        if epoch < self._communicator.epoch:
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
        epoch = self._communicator.epoch
        for awaited in self._awaited:
            if awaited.payload is not None or awaited.epoch != epoch:
                continue
            members = self._communicator.members if awaited.member is None else (awaited.member,)
            for member in members:
                found = self._messages.get((member, epoch, awaited.tag))
                if found:
                    awaited.payload = (member, found.popleft())
                    break

    def misses(self, departed: set[WorkerId]) -> set[WorkerId]:
        """Those of `departed` without whom some receive cannot end: no message of theirs is here, none will come."""
        missed: set[WorkerId] = set()
        for awaited in self._awaited:
            if not self.ready(awaited):
                communicator = self._communicator
                others = set(communicator.members) - {communicator.me}
                senders = others if awaited.member is None else {awaited.member}
                missed |= senders if senders <= departed else set()
        return missed

    def edited(self) -> None:
        """The communicator has a new epoch."""
        epoch = self._communicator.epoch
        self._messages = {key: found for key, found in self._messages.items() if key[1] >= epoch}
        self._match()

    def ready(self, awaited: Awaited) -> bool:
        """A message is here, or none can come any more."""
        return awaited.payload is not None or awaited.epoch != self._communicator.epoch

    def take(self, awaited: Awaited, like: Tensor) -> int:
        """Copy the message into `like`; returns its sender. Raises EpochChanged, ProtocolError for another length."""
        if awaited.payload is None:
            raise EpochChanged(f"{self._communicator.name} changed while a message was awaited: call reconfigure()")
        member, payload = awaited.payload
        expected = like.numel() * like.element_size()
        if payload.numel() != expected:
            raise ProtocolError(f"worker {member} sent {payload.numel()} bytes; this receive expects {expected}")
        if expected:  # a tensor without elements has no stride that could be viewed as another dtype
            like.copy_(payload.view(like.dtype))
        return self._communicator.members.index(member)

    def give_up(self, awaited: Awaited) -> None:
        """Wait no longer."""
        if awaited in self._awaited:
            self._awaited.remove(awaited)
