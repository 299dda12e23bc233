"""Fabric: what the process groups of one torch process share: an endpoint, a roster, and the news of losses."""

import os
import tempfile
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from hashlib import sha256
from pathlib import Path
from shutil import rmtree

from elaswave.certificates import files_from_environment
from elaswave.comm.addresses import LinkOptions
from elaswave.comm.communicator import Communicator
from elaswave.comm.directory import Admission, Directory, Entry, RendezvousStore, own_entry, reaching_store
from elaswave.comm.endpoint import Endpoint
from elaswave.comm.endpoint_options import EndpointOptions
from elaswave.comm.inbox import PeerClosed
from elaswave.comm.neighbour_watch import NeighbourWatch
from elaswave.comm.roster import FIRST, Roster, add, decode_roster, remove
from elaswave.core.ids import WorkerId
from elaswave.errors import DeadlineExceeded, ElasWaveError, EpochChanged, LinkClosed, ProtocolError

CLOSE_S = 5.0
FOLDER_PREFIX = "elaswave-"
LOOK_S = 0.005
"""How often those who make a group look whether all have come: a store cannot be awaited together with links."""
NAMED_MEMBERS = 16
"""Names of groups tell their members, up to so many."""

RETIRED_LIMIT = 64
"""Destroyed groups that are kept for others where the first group is not used."""

WATCH_AFTER_S = 0.25
"""Then those who make a group watch whom they wait for: the end of a process that nobody has a link with is noticed
where it was killed, not where it has ended by itself."""

MADE, BROKEN = "made", "broken"
"""What those who make a group decide; or the ranks that have not come."""

HOST_VARIABLE = "ELASWAVE_HOST"
"""Numeric address at which this process listens for those of other hosts. Default: 127.0.0.1."""
SHARED_MEMORY_VARIABLE = "ELASWAVE_SHARED_MEMORY"
"""0: groups that this process is in use links only, also where all their processes are on one host."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Origin:
    """What a communicator began with: members, and the epoch of the roster at which they gathered."""

    members: tuple[WorkerId, ...]
    epoch: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Retired:
    """A communicator that was destroyed here. until: number of an operation of the first group; then it is for all."""

    origin: Origin
    until: int


class Fabric:
    """Made with the first process group, which all processes are in; its ranks name the workers from then on."""

    def __init__(
        self, store: RendezvousStore, rank: int, size: int, timeout: timedelta, *, joins: bool = False
    ) -> None:
        """Opens the endpoint and finds the peers. Raises what the store raises where they do not come in time.

        joins: this process is none of those that the job began with; rank and size are not known then.
        """
        self._directory = Directory(store)
        self._lock = threading.RLock()
        self._roster: Roster = FIRST
        self._departed: set[WorkerId] = set()
        self._timeout_s = timeout.total_seconds()
        self._made: dict[tuple[tuple[WorkerId, ...], int], int] = {}  # groups of members and an epoch, tried so far
        self._origins: dict[Communicator, Origin] = {}
        self._retired: dict[Communicator, Retired] = {}
        self._entries: dict[WorkerId, Entry] = {}
        self._watch: NeighbourWatch | None = None
        self._world: Communicator | None = None  # that of the first group, to which new processes come
        self._admission: Admission | None = None
        self.me = self._directory.apply(timeout) if joins else WorkerId(rank)
        token, links = self._directory.token(first=rank == 0 and not joins), files_from_environment(os.environ)
        options = EndpointOptions(agree_s=self._timeout_s, links=LinkOptions(tls=links))
        self.endpoint = Endpoint(self.me, token, on_lost=self._peer_lost, on_notice=self._noticed, options=options)
        self._folder = Path(tempfile.mkdtemp(prefix=FOLDER_PREFIX))
        try:
            self._publish()
            if joins:
                self._await_admission(timeout)
            else:
                self._meet(self._directory.meet(size, timeout))
        except BaseException:
            self.close()
            raise

    def _publish(self) -> None:
        """Listen at a Unix socket for processes of this host, at TCP for others, and tell where."""
        unix = self.endpoint.open(f"unix:{self._folder / 'links'}")
        tcp = self.endpoint.listen(f"tcp:{os.environ.get(HOST_VARIABLE, '127.0.0.1')}:0")
        memory = os.environ.get(SHARED_MEMORY_VARIABLE) != "0"
        self._entries[self.me] = own_entry(unix, tcp, shares_memory=memory)
        self._directory.publish(self.me, self._entries[self.me])

    def _meet(self, entries: Mapping[WorkerId, Entry]) -> None:
        """Get to know processes, and watch those that can be watched."""
        self._entries |= entries
        own = self._entries[self.me]
        self.endpoint.connect({peer: entry.address_for(own) for peer, entry in entries.items()})
        gone = dict(self._roster.removed)
        found = {peer: entry.process_for(own) for peer, entry in self._entries.items() if peer not in gone}
        if self._watch is not None:
            self._watch.close()
        processes = {peer: process for peer, process in found.items() if process}
        self._watch = NeighbourWatch(self.me, processes, self._neighbour_dies)
        self._watch.start()

    def _await_admission(self, timeout: timedelta) -> None:
        deadline = time.monotonic() + timeout.total_seconds()
        try:
            admission = self._directory.await_admission(self.me, timeout)
        except RuntimeError as error:
            if time.monotonic() < deadline:
                raise LinkClosed(f"the store of the job is gone: {error}") from error
            self._directory.withdraw(self.me)
            limit = f"within {timeout.total_seconds():g} s"
            raise DeadlineExceeded(
                f"the job has not let this process in {limit}: its ranks have to call admit()"
            ) from error
        self._admission, self._roster = admission, admission.roster
        self._meet(self._directory.entries(admission.members))

    # ------------------------------------------------------------------ groups

    def world(self, name: str) -> Communicator:
        """The first communicator, of all processes; once. New ones come to it."""
        with self._lock:
            found = self._world = self._make_world(name)
        return found

    def _make_world(self, name: str) -> Communicator:
        admission = self._admission
        if admission is None:
            return self.communicator(name, sorted(self._entries))
        found = self.endpoint.communicator(name, admission.members, epoch=admission.roster.epoch)
        self._origins[found] = Origin(members=admission.members, epoch=admission.roster.epoch)
        return found

    def gather(self, ranks: Sequence[int], timeout: timedelta) -> Communicator:
        """That of a new group of these ranks of the first one, in this order; all its members call it.

        What else a process has made, or tried to make, need not be the same on all: after a loss it is not. Raises
        EpochChanged where a loss keeps a member away. DeadlineExceeded on all of them where one does not come; then the
        first group fails with it, too, until a member is lost.
        """
        with self._lock:
            epoch = self._roster.epoch  # who has not heard of it yet will, and come again
            if self.failure is not None:
                raise self.failure
            if self.broken:  # others may come to this place later, when they have taken up their groups
                raise EpochChanged("a member was lost before a group was made: call reconfigure() and make it then")
            first = next(iter(self._origins)).members
            members = tuple(first[rank] for rank in ranks)
        name = _name_of(members, epoch, self._made.get((members, epoch), 0))
        decision = self._decide(f"elaswave/group/{name}", members, timeout)
        self._made[members, epoch] = self._made.get((members, epoch), 0) + 1
        if decision == MADE:
            return self.communicator(name, members, since=epoch)
        if decision == BROKEN:
            raise EpochChanged("a member was lost while a group was made: call reconfigure() and make it again")
        late = DeadlineExceeded(f"ranks {decision} of a new group of {name} have not come in time")
        self.endpoint.fail(next(iter(self._origins)), late)  # ranks may be at different steps now
        raise late

    def _decide(self, place: str, members: Sequence[WorkerId], timeout: timedelta) -> str:
        """Wait for them; who has not come in time, or MADE or BROKEN. The same on all: who is first decides."""
        store, keys = self._directory.store, {worker: f"{place}/{worker}" for worker in members}
        began = time.monotonic()
        deadline = began + timeout.total_seconds()
        with reaching_store():
            store.set(keys[self.me], "1")
            wanted = MADE
            while not store.check(list(keys.values())):
                self._remove(self._departed & set(members))  # who has left in order will not come
                if self.broken:
                    wanted = BROKEN
                    break
                now = time.monotonic()
                if now > deadline:
                    wanted = str([index for index, key in enumerate(keys.values()) if not store.check([key])])
                    break
                if now > began + WATCH_AFTER_S:
                    self.endpoint.watch(worker for worker, key in keys.items() if not store.check([key]))
                with suppress(DeadlineExceeded):
                    self.endpoint.drive(lambda: self.broken, now + LOOK_S, "news of a lost member")
            return store.compare_set(f"{place}/decision", "", wanted).decode()

    def communicator(self, name: str, members: Sequence[WorkerId], *, since: int = 0) -> Communicator:
        """A new one of these workers, who have agreed on it in this epoch, without those that are gone by now."""
        found = self.endpoint.communicator(name, members)
        with self._lock:
            origin = self._origins[found] = Origin(members=tuple(members), epoch=since)
            self._apply(found, origin)
        return found

    def shares_memory(self, communicator: Communicator) -> bool:
        """All that it began with are processes of one host, and none was told not to; the same on all members."""
        if communicator is self._world and self._admission is not None:
            return self._admission.shares_memory
        entries = [self._entries[worker] for worker in self._origins[communicator].members]
        return all(entry.shares_memory and entry.host == entries[0].host for entry in entries)

    @property
    def may_share(self) -> bool:
        """Whether this process was not told to keep to links."""
        return self._entries[self.me].shares_memory

    def drop(self, communicator: Communicator) -> None:
        """It is not used any more; with the last one the fabric ends."""
        with self._lock:
            origin = self._origins.pop(communicator, None)
            last = not self._origins
            if origin is None or last:
                self.endpoint.drop(communicator)
            else:
                self._retire(communicator, origin)
        if last:
            self.close()

    def _retire(self, communicator: Communicator, origin: Origin) -> None:
        """Others may not be as far as this: until all have come to the next operation of the first group."""
        first = next(iter(self._origins))
        self.endpoint.retire(communicator)
        self._retired[communicator] = Retired(origin=origin, until=first.next_number)
        over = [found for found, retired in self._retired.items() if first.completed >= retired.until]
        for found in over or list(self._retired)[:-RETIRED_LIMIT]:
            del self._retired[found]
            self.endpoint.drop(found)

    @property
    def closed(self) -> bool:
        """`close` was called."""
        return not self._folder.exists()

    def close(self) -> None:
        """Say good-bye to the peers and end the endpoint."""
        if self._watch is not None:
            self._watch.close()
        self.endpoint.close(CLOSE_S)
        for worker, _ in self._roster.removed:
            self._clean_up_after(worker)  # who had to do so at once may have been lost itself
        rmtree(self._folder, ignore_errors=True)

    # ------------------------------------------------------------------ losses

    @property
    def broken(self) -> bool:
        """Some communicator here has lost a member and was not taken up again."""
        return any(found.broken for found in tuple(self._origins))

    @property
    def failure(self) -> ElasWaveError | None:
        """What some communicator here has failed with, if not with a loss."""
        return next((found.failure for found in tuple(self._origins) if found.failure is not None), None)

    def reconfigure(self) -> int:
        """Take up all communicators again, once the members of the first one have agreed on what has succeeded.

        And those of others where operations are under way here, which write to tensors when they succeed; for the rest
        nobody waits who does not use them: what is started on them waits for their agreement.
        After DeadlineExceeded it waits for a loss. Raises EpochChanged where this process was removed itself,
        DeadlineExceeded where it takes longer than the timeout of the first process group. Returns the epoch.
        """
        deadline = time.monotonic() + self._timeout_s
        while (epoch := self._take_up()) is None:
            for communicator in self._unsettled():
                self.endpoint.await_agreement(communicator, deadline)
        return epoch

    def _unsettled(self) -> list[Communicator]:
        found = tuple(self._origins)
        broken = [communicator for communicator in found if communicator.broken and not communicator.agreed]
        return [
            communicator
            for communicator in broken
            if communicator is found[0] or communicator.unended or communicator.failure is not None
        ]

    def _take_up(self) -> int | None:
        """All of them in the same epoch: were one taken up in the next, its operations would run ahead of others."""
        with self._lock:  # so that no edit comes between
            if self._unsettled():
                return None
            for communicator in tuple(self._origins):
                if communicator.broken:
                    self.endpoint.acknowledge(communicator)
            if not all(communicator.agreed for communicator in self._origins):
                self.endpoint.attend()  # others may wait for an agreement that this rank has no use for
            return self._roster.epoch

    @property
    def losses(self) -> int:
        """How many are known to be lost."""
        return len(self._roster.removed)

    def is_world(self, communicator: Communicator) -> bool:
        """Whether it is the first one, to which new processes come."""
        return communicator is self._world

    @property
    def has_joined(self) -> bool:
        """This process is none of those that the job began with."""
        return self._admission is not None

    def applicants(self) -> list[WorkerId]:
        """Processes that wait to join."""
        return self._directory.applicants(dict(self._roster.added))

    def add(self, workers: Iterable[WorkerId]) -> None:
        """Have them join the first communicator, which all its members then take up again."""
        with self._lock:
            with reaching_store():
                roster = add(self._directory.store, self._roster, workers, by=self.me)
            self._adopt(roster)
        self._tell(roster)

    def await_change(self) -> None:
        """Until some member is lost, or others have come."""
        deadline = time.monotonic() + self._timeout_s
        self.endpoint.drive(lambda: self.broken, deadline, "the admission of new processes")

    def check_departed(self, communicator: Communicator) -> None:
        """A peer that has left in order is lost to who still wants something of it."""
        gone = self._departed & set(communicator.members)
        if gone:
            self._remove(gone)

    def _peer_lost(self, closed: PeerClosed) -> None:
        if closed.orderly:
            self._departed.add(closed.peer)
            self.endpoint.depart(closed.peer)
        else:
            self._remove({closed.peer})

    def _neighbour_dies(self, worker: WorkerId) -> None:
        if worker not in self._departed:
            self.endpoint.report_lost(worker, "the kernel is ending its process")

    def _remove(self, peers: set[WorkerId]) -> None:
        with self._lock:
            known = {worker for worker, _ in self._roster.removed}
            if not peers - known or not self._origins:
                return
            with reaching_store():
                roster = remove(self._directory.store, self._roster, peers, by=self.me)
            # Many notice a loss at once: if all told all, most of the news, and of the links that are dialled for it,
            # would be for nothing. Should the writer be lost before it has told, then who notices that tells of both.
            if roster.writer == self.me:
                self._tell(roster)  # first: all others go on with what is for nothing until they know
            self._adopt(roster)

    def _tell(self, roster: Roster) -> None:
        # Not to those that have left: they need no news, and a dial that fails would make a loss of their end.
        content = roster.encode().encode()
        for worker in self._entries.keys() - dict(roster.removed).keys() - self._departed - {self.me}:
            self.endpoint.notify(worker, content)

    def _noticed(self, peer: WorkerId, content: bytes) -> None:
        roster = decode_roster(content)
        with self._lock:
            known = self._entries.keys() | dict(roster.added).keys() | dict(self._roster.removed).keys()
            unknown = dict(roster.removed).keys() - known
            if unknown:
                raise ProtocolError(f"a roster of worker {peer} removes {sorted(unknown)}, which were never there")
            if roster.epoch > self._roster.epoch:
                self._adopt(roster)

    def _adopt(self, roster: Roster) -> None:
        gone = dict(roster.removed).keys() - dict(self._roster.removed).keys()
        new = dict(roster.added).keys() - dict(self._roster.added).keys()
        self._roster = roster
        if new:
            self._meet(self._directory.entries(new - gone))
        for worker in gone:
            self.endpoint.forget(worker)
            if roster.writer == self.me:
                self._clean_up_after(worker)
        for communicator, origin in tuple(self._origins.items()):
            self._apply(communicator, origin)
        for communicator, retired in self._retired.items():
            self._apply(communicator, retired.origin)
        for worker in new - gone:
            self._let_in(worker, roster)

    def _let_in(self, worker: WorkerId, roster: Roster) -> None:
        """Whoever hears of it does so: who has begun it may be lost by now."""
        if self._world is not None:
            memory = self.shares_memory(self._world)
            admission = Admission(roster=roster, members=self._world.members, shares_memory=memory)
            self._directory.admit(worker, admission)

    def _clean_up_after(self, worker: WorkerId) -> None:
        """A killed process leaves the folder of its socket behind; nobody dials a removed one any more."""
        entry = self._entries.get(worker)
        if entry is None or entry.host != self._entries[self.me].host:
            return
        folder = Path(entry.unix.removeprefix("unix:")).parent
        if folder.name.startswith(FOLDER_PREFIX):
            rmtree(folder, ignore_errors=True)

    def _apply(self, communicator: Communicator, origin: Origin) -> None:
        grows = communicator is self._world
        for change in self._roster.changes(origin.members, grows=grows):
            if change.epoch > max(communicator.epoch, origin.epoch):
                self.endpoint.edit(communicator, change.epoch, change.removed, change.added)


def _name_of(members: tuple[WorkerId, ...], epoch: int, count: int) -> str:
    """The same on all members, and of no other group."""
    listed = ",".join(map(str, members))
    if len(members) > NAMED_MEMBERS:
        listed = f"{members[0]},...,{members[-1]} ({sha256(listed.encode()).hexdigest()[:16]})"
    return f"workers {listed}" + (f"/{epoch}/{count}" if epoch or count else "")
