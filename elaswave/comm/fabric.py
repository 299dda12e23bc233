"""Fabric: what the process groups of one torch process share: an endpoint, a roster, and the news of losses."""

import os
import secrets
import socket
import tempfile
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from shutil import rmtree
from typing import Protocol

from elaswave.certificates import files_from_environment
from elaswave.comm.addresses import LinkOptions
from elaswave.comm.communicator import Communicator
from elaswave.comm.endpoint import Endpoint, EndpointOptions
from elaswave.comm.inbox import PeerClosed
from elaswave.comm.neighbour_watch import NeighbourWatch, own_process, process_of
from elaswave.comm.roster import FIRST, Roster, Store, decode_roster, remove
from elaswave.core.ids import WorkerId
from elaswave.errors import DeadlineExceeded, ElasWaveError, EpochChanged, LinkClosed, ProtocolError

CLOSE_S = 5.0
FOLDER_PREFIX = "elaswave-"
LOOK_S = 0.005
"""How often those who make a group look whether all have come: a store cannot be awaited together with links."""
TOKEN_BYTES = 32
HOST_VARIABLE = "ELASWAVE_HOST"
"""Numeric address at which this process listens for those of other hosts. Default: 127.0.0.1."""
SHARED_MEMORY_VARIABLE = "ELASWAVE_SHARED_MEMORY"
"""0: groups that this process is in use links only, also where all their processes are on one host."""


class RendezvousStore(Store, Protocol):
    """What is needed of a torch.distributed.Store to find each other."""

    def get(self, key: str, /) -> bytes: ...

    def set(self, key: str, value: str, /) -> None: ...

    def wait(self, keys: list[str], timeout: timedelta, /) -> None: ...

    def check(self, keys: list[str], /) -> bool: ...


class Fabric:
    """Made with the first process group, which all processes are in; its ranks name the workers from then on."""

    def __init__(self, store: RendezvousStore, rank: int, size: int, timeout: timedelta) -> None:
        """Opens the endpoint and finds the peers. Raises what the store raises where they do not come in time."""
        self.me = WorkerId(rank)
        self._store = store
        self._lock = threading.RLock()
        self._roster: Roster = FIRST
        self._departed: set[WorkerId] = set()
        self._timeout_s = timeout.total_seconds()
        self._neighbours: set[WorkerId] = set()  # processes of this host that share memory
        self._made: dict[tuple[str, int], int] = {}  # groups of a name and epoch so far
        self._origins: dict[Communicator, tuple[WorkerId, ...]] = {}
        self._addresses: dict[WorkerId, str] = {}
        self._watch: NeighbourWatch | None = None
        links = LinkOptions(tls=files_from_environment(os.environ))
        token, options = self._token(rank), EndpointOptions(agree_s=self._timeout_s, links=links)
        self.endpoint = Endpoint(self.me, token, on_lost=self._peer_lost, on_notice=self._noticed, options=options)
        self._folder = Path(tempfile.mkdtemp(prefix=FOLDER_PREFIX))
        try:
            self._meet(rank, size, timeout)
        except BaseException:
            self.close()
            raise

    def _token(self, rank: int) -> bytes:
        if rank == 0:
            self._store.set("elaswave/token", secrets.token_hex(TOKEN_BYTES))
        return bytes.fromhex(self._store.get("elaswave/token").decode())

    def _meet(self, rank: int, size: int, timeout: timedelta) -> None:
        """Exchange addresses: a Unix socket for processes of this host, TCP for others."""
        unix = self.endpoint.open(f"unix:{self._folder / 'links'}")
        tcp = self.endpoint.listen(f"tcp:{os.environ.get(HOST_VARIABLE, '127.0.0.1')}:0")
        memory = "0" if os.environ.get(SHARED_MEMORY_VARIABLE) == "0" else "1"
        self._store.set(f"elaswave/address/{rank}", " ".join((_host(), own_process(), memory, unix, tcp)))
        keys = [f"elaswave/address/{peer}" for peer in range(size)]
        self._store.wait(keys, timeout)
        processes: dict[WorkerId, int] = {}
        for peer, key in enumerate(keys):
            host, process, memory, unix, tcp = self._store.get(key).decode().split(" ")
            self._addresses[WorkerId(peer)] = unix if host == _host() else tcp
            if host == _host() and memory == "1":
                self._neighbours.add(WorkerId(peer))
            if host == _host() and process_of(process):
                processes[WorkerId(peer)] = process_of(process)
        self.endpoint.connect(self._addresses)
        self._watch = NeighbourWatch(self.me, processes, self._neighbour_dies)
        self._watch.start()

    def gather(self, name: str, store: RendezvousStore, rank: int, size: int, timeout: timedelta) -> Communicator:
        """That of a new group; all members call it with a store of the group's own.

        Name and store may be those of an earlier group of the same ranks, if all members have had that: torch hashes
        names of its ranks. Raises EpochChanged where a loss keeps a member away: one that waited for it here would hear
        of nothing.
        """
        with self._lock:
            epoch = self._roster.epoch  # who has not heard of it yet will, and come again
            if self.broken:  # others may come to this place later, when they have taken up their groups
                raise EpochChanged("a member was lost before a group was made: call reconfigure() and make it then")
        count = self._made.get((name, epoch), 0)
        place = f"elaswave/{epoch}/{count}"
        members = self._gather(place, store, rank, size, timeout)
        self._made[name, epoch] = count + 1  # only what all have made: attempts differ
        return self.communicator(f"{name}/{epoch}/{count}" if epoch or count else name, members)

    def _gather(self, place: str, store: RendezvousStore, rank: int, size: int, timeout: timedelta) -> list[WorkerId]:
        decision = f"{place}/decision"
        store.set(f"{place}/member/{rank}", str(self.me))
        keys = [f"{place}/member/{index}" for index in range(size)]
        deadline = time.monotonic() + timeout.total_seconds()
        while not store.check(keys):
            if self.broken:
                store.compare_set(decision, "", "broken")
                break
            now = time.monotonic()
            if now > deadline:
                missing = [index for index, key in enumerate(keys) if not store.check([key])]
                raise DeadlineExceeded(f"ranks {missing} of a new group have not come in {timeout.total_seconds()} s")
            with suppress(DeadlineExceeded):
                self.endpoint.drive(lambda: self.broken, now + LOOK_S, "news of a lost member")
        # Whoever decides first decides for all, so that nobody has a group of which another has not heard.
        if store.compare_set(decision, "", "made") != b"made":
            raise EpochChanged("a member was lost while a group was made: call reconfigure() and make it again")
        return [WorkerId(int(store.get(key))) for key in keys]

    def communicator(self, name: str, members: Sequence[WorkerId]) -> Communicator:
        """A new one of these workers, without those that are gone by now."""
        found = self.endpoint.communicator(name, members)
        with self._lock:
            self._origins[found] = tuple(members)
            self._apply(found)
        return found

    def shares_memory(self, communicator: Communicator) -> bool:
        """All that it began with are processes of this host, and none was told not to; the same on all of them."""
        return self._neighbours.issuperset(self._origins[communicator])

    def drop(self, communicator: Communicator) -> None:
        """It is not used any more; with the last one the fabric ends."""
        with self._lock:
            self._origins.pop(communicator, None)
            self.endpoint.drop(communicator)
            last = not self._origins
        if last:
            self.close()

    @property
    def closed(self) -> bool:
        """`close` was called."""
        return not self._folder.exists()

    def close(self) -> None:
        """Say good-bye to the peers and end the endpoint."""
        if self._watch is not None:
            self._watch.close()
        self.endpoint.close(CLOSE_S)
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

    def reconfigure(self) -> None:
        """Wait until the members of every broken communicator have agreed on what has succeeded, and take it up again.

        After DeadlineExceeded it waits for a loss. Raises EpochChanged where this process was removed itself,
        DeadlineExceeded where it takes longer than the timeout of the first process group.
        """
        deadline = time.monotonic() + self._timeout_s
        for communicator in tuple(self._origins):
            if communicator.broken:
                self.endpoint.acknowledge(communicator, deadline)

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
            try:
                roster = remove(self._store, self._roster, peers, by=self.me)
            except RuntimeError as error:  # torch's stores raise subclasses of it when their process is gone
                raise LinkClosed(f"the store of the process group is gone: {error}") from error
            self._adopt(roster)
            others = {worker for members in self._origins.values() for worker in members}
        if roster.writer != self.me:
            # Many notice a loss at once: if all told all, most of the news, and of the links that are dialled for it,
            # would be for nothing. Should the writer be lost before it has told, then who notices that tells of both.
            return
        for worker in others - {worker for worker, _ in roster.removed} - {self.me}:
            self.endpoint.notify(worker, roster.encode().encode())

    def _noticed(self, peer: WorkerId, content: bytes) -> None:
        roster = decode_roster(content)
        unknown = {worker for worker, _ in roster.removed} - set(self._addresses)
        if unknown:
            raise ProtocolError(f"a roster of worker {peer} removes {sorted(unknown)}, which were never there")
        with self._lock:
            if roster.epoch > self._roster.epoch:
                self._adopt(roster)

    def _adopt(self, roster: Roster) -> None:
        new = {worker for worker, _ in roster.removed} - {worker for worker, _ in self._roster.removed}
        self._roster = roster
        for worker in new:
            self.endpoint.forget(worker)
            self._clean_up_after(worker)
        for communicator in tuple(self._origins):
            self._apply(communicator)

    def _clean_up_after(self, worker: WorkerId) -> None:
        """A killed process leaves the folder of its socket behind; nobody dials a removed one any more."""
        _, _, socket_path = self._addresses[worker].partition("unix:")
        folder = Path(socket_path).parent
        if folder.name.startswith(FOLDER_PREFIX):
            rmtree(folder, ignore_errors=True)

    def _apply(self, communicator: Communicator) -> None:
        origin = self._origins[communicator]
        gone = [worker for worker, _ in self._roster.removed if worker in origin]
        self.endpoint.edit(communicator, self._roster.epoch_of(origin), gone)


def _host() -> str:
    """The same for processes that share a kernel and a network namespace, and for no others."""
    namespace = os.stat("/proc/self/ns/net").st_ino
    return f"{socket.gethostname()}/{Path('/proc/sys/kernel/random/boot_id').read_text().strip()}/{namespace}"
