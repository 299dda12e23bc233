"""Directory: what the processes of a lone torch job tell each other through the job's store before they have links."""

import json
import os
import secrets
import socket
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Protocol

from elaswave.comm.neighbour_watch import own_process, process_of
from elaswave.comm.roster import Roster, Store, decode_roster
from elaswave.core.ids import WorkerId
from elaswave.errors import LinkClosed, ProtocolError

TOKEN_BYTES = 32
APPLICANT_LIMIT = 1 << 20


class RendezvousStore(Store, Protocol):
    """What is needed of a torch.distributed.Store to find each other."""

    def get(self, key: str, /) -> bytes: ...

    def set(self, key: str, value: str, /) -> None: ...

    def add(self, key: str, amount: int, /) -> int: ...

    def wait(self, keys: list[str], timeout: timedelta, /) -> None: ...

    def check(self, keys: list[str], /) -> bool: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """Where a process is and listens. host: equal for processes that share a kernel and a network namespace.

    process: see own_process. shares_memory: it may, with others of its host. unix, tcp: its addresses.
    """

    host: str
    process: str
    shares_memory: bool
    unix: str
    tcp: str

    def address_for(self, other: "Entry") -> str:
        """Where the other one reaches it."""
        return self.unix if self.host == other.host else self.tcp

    def process_for(self, other: "Entry") -> int:
        """Its process id, where the other one can look at it; else 0."""
        return process_of(self.process, other.process) if self.host == other.host else 0

    def encode(self) -> str:
        """As text."""
        return " ".join((self.host, self.process, "1" if self.shares_memory else "0", self.unix, self.tcp))


def decode_entry(text: bytes) -> Entry:
    """Read what `encode` wrote. Raises ProtocolError for anything else."""
    try:
        host, process, memory, unix, tcp = text.decode().split(" ")
    except ValueError as error:
        raise ProtocolError(f"an entry of the store is {text[:200]!r}: it must be five words") from error
    return Entry(host=host, process=process, shares_memory=memory == "1", unix=unix, tcp=tcp)


@dataclass(frozen=True, slots=True, kw_only=True)
class Admission:
    """What a process that joins begins with: the roster, and the members in their order, itself among them.

    shares_memory: of the group that it joins, all that it began with share memory.
    """

    roster: Roster
    members: tuple[WorkerId, ...]
    shares_memory: bool

    def encode(self) -> str:
        """As text."""
        content = {"roster": self.roster.encode(), "members": self.members, "shares_memory": self.shares_memory}
        return json.dumps(content)


def decode_admission(text: bytes) -> Admission:
    """Read what `encode` wrote. Raises ProtocolError for anything else."""
    try:
        found = json.loads(text)
        members = tuple(WorkerId(int(worker)) for worker in found["members"])
        roster, memory = decode_roster(found["roster"]), bool(found["shares_memory"])
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        raise ProtocolError(f"an admission cannot be read: {error}") from error
    return Admission(roster=roster, members=members, shares_memory=memory)


@contextmanager
def reaching_store() -> Iterator[None]:
    """Raise LinkClosed where the store's process is gone: torch's stores raise RuntimeError or one of its kinds."""
    try:
        yield
    except RuntimeError as error:
        raise LinkClosed(f"the store of the process group is gone: {error}") from error


class Directory:
    """Reads and writes the store.

    What begins a job, or joins it, raises what the store raises where it, or what is waited for, is not there; what
    goes on while the job runs raises LinkClosed.
    """

    def __init__(self, store: RendezvousStore) -> None:
        self.store = store

    def token(self, *, first: bool) -> bytes:
        """The secret of the job; the first process makes it."""
        if first:
            self.store.set("elaswave/token", secrets.token_hex(TOKEN_BYTES))
        return bytes.fromhex(self.store.get("elaswave/token").decode())

    def publish(self, worker: WorkerId, entry: Entry) -> None:
        """Let others find this process."""
        self.store.set(_entry_key(worker), entry.encode())

    def meet(self, size: int, timeout: timedelta) -> dict[WorkerId, Entry]:
        """Wait until all of a new job are here."""
        workers = [WorkerId(worker) for worker in range(size)]
        self.store.set("elaswave/size", str(size))
        self.store.wait([_entry_key(worker) for worker in workers], timeout)
        return self.entries(workers)

    def entries(self, workers: Iterable[WorkerId]) -> dict[WorkerId, Entry]:
        """Of these, which have published theirs."""
        with reaching_store():
            return {worker: decode_entry(self.store.get(_entry_key(worker))) for worker in workers}

    # ------------------------------------------------------------------ who comes later

    def apply(self, timeout: timedelta) -> WorkerId:
        """A number of its own for a process that wants to join the job, once there is a job."""
        self.store.wait(["elaswave/size"], timeout)
        return WorkerId(self._size() + self.store.add("elaswave/applicants", 1) - 1)

    def withdraw(self, worker: WorkerId) -> None:
        """It has applied, and does not want to join any more."""
        self.store.set(_withdrawal_key(worker), "1")

    def applicants(self, known: Collection[WorkerId]) -> list[WorkerId]:
        """Who waits to join; `known` have joined, or were removed since."""
        with reaching_store():
            count = self.store.add("elaswave/applicants", 0)
            if count > APPLICANT_LIMIT:
                raise ProtocolError(f"{count} processes have applied: the limit is {APPLICANT_LIMIT}")
            first = self._size() if count else 0
            applied = {WorkerId(first + index) for index in range(count)} - set(known)
            return [worker for worker in sorted(applied) if self._is_there(worker)]

    def _is_there(self, worker: WorkerId) -> bool:
        return self.store.check([_entry_key(worker)]) and not self.store.check([_withdrawal_key(worker)])

    def admit(self, worker: WorkerId, admission: Admission) -> None:
        """Tell it that it is in; any of those that know, all with the same words."""
        with reaching_store():
            self.store.set(f"elaswave/admission/{worker}", admission.encode())

    def await_admission(self, worker: WorkerId, timeout: timedelta) -> Admission:
        """Wait for that."""
        key = f"elaswave/admission/{worker}"
        self.store.wait([key], timeout)
        return decode_admission(self.store.get(key))

    def _size(self) -> int:
        return int(self.store.get("elaswave/size"))


def own_host() -> str:
    """The same for processes that share a kernel and a network namespace, and for no others."""
    namespace = os.stat("/proc/self/ns/net").st_ino
    return f"{socket.gethostname()}/{Path('/proc/sys/kernel/random/boot_id').read_text().strip()}/{namespace}"


def own_entry(unix: str, tcp: str, *, shares_memory: bool) -> Entry:
    """Of this process."""
    return Entry(host=own_host(), process=own_process(), shares_memory=shares_memory, unix=unix, tcp=tcp)


def _entry_key(worker: WorkerId) -> str:
    return f"elaswave/address/{worker}"


def _withdrawal_key(worker: WorkerId) -> str:
    # Beside the entry, which whoever lets it in at the same moment still has to be able to read.
    return f"elaswave/withdrawn/{worker}"
