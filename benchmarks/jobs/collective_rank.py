"""One rank of the gang in which collectives are timed: a group of ours for each way, and torch's gloo."""

import time
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Protocol

import torch
import torch.distributed as dist
from ranks import connect_store, wait_until
from torch import Tensor

from elaswave.comm.arena import ARENA_BYTES
from elaswave.comm.endpoint import Endpoint
from elaswave.comm.group import Group
from elaswave.comm.inbox import PeerClosed
from elaswave.core.ids import WorkerId
from elaswave.errors import LinkClosed

GLOO = "gloo"
LIMIT_S = 100.0
ELEMENT_BYTES = 4  # of float32


@dataclass(frozen=True, slots=True, kw_only=True)
class Way:
    """How ranks reach each other: a scheme of addresses, and whether they share memory besides."""

    scheme: str
    arena_bytes: int = 0


WAYS = {
    "Unix sockets": Way(scheme="unix"),
    "TCP": Way(scheme="tcp"),
    "shared memory": Way(scheme="unix", arena_bytes=ARENA_BYTES),
}


class System(Protocol):
    """What is compared. `part` is one of as many equal parts of `whole` as there are ranks."""

    def all_reduce(self, whole: Tensor) -> None: ...

    def reduce_scatter(self, part: Tensor, whole: Tensor) -> None: ...

    def all_gather(self, whole: Tensor, part: Tensor) -> None: ...


class Ours:
    """A group, without the layer of torch.distributed above it."""

    def __init__(self, group: Group) -> None:
        self._group = group
        self._wait = group.endpoint.wait
        self._size = group.communicator.size

    def all_reduce(self, whole: Tensor) -> None:
        self._wait(self._group.all_reduce(whole))

    def reduce_scatter(self, part: Tensor, whole: Tensor) -> None:
        self._wait(self._group.reduce_scatter(part, whole.chunk(self._size)))

    def all_gather(self, whole: Tensor, part: Tensor) -> None:
        self._wait(self._group.all_gather(whole.chunk(self._size), part))


class Gloo:
    """The default group of torch.distributed."""

    def all_reduce(self, whole: Tensor) -> None:
        dist.all_reduce(whole)

    def reduce_scatter(self, part: Tensor, whole: Tensor) -> None:
        dist.reduce_scatter_single(part, whole)

    def all_gather(self, whole: Tensor, part: Tensor) -> None:
        dist.all_gather_single(whole, part)


class CollectiveRank:
    """Its methods are called by the benchmark, on all ranks at once."""

    def __init__(self, rank: int, size: int) -> None:
        self._rank = rank
        self._size = size
        self._endpoints: dict[str, Endpoint] = {}
        self._systems: dict[str, System] = {}

    def listen(self, folder: Path) -> dict[str, str]:
        """Open an endpoint for each way; their addresses."""
        given: dict[str, str] = {}
        for number, (name, way) in enumerate(WAYS.items()):
            endpoint = Endpoint(WorkerId(self._rank), b"benchmark", on_lost=_lost, on_notice=_ignore)
            self._endpoints[name] = endpoint
            place = f"{folder}/{self._rank}.{number}" if way.scheme == "unix" else "127.0.0.1:0"
            given[name] = endpoint.open(f"{way.scheme}:{place}")
        return given

    def connect(self, addresses: dict[int, dict[str, str]], store_port: int) -> None:
        """Make the groups, and gloo's, which has all its connections when this returns."""
        members = [WorkerId(rank) for rank in range(self._size)]
        for name, way in WAYS.items():
            endpoint = self._endpoints[name]
            endpoint.connect({WorkerId(rank): given[name] for rank, given in addresses.items()})
            made = endpoint.communicator(name, members)
            self._systems[name] = Ours(Group(endpoint, made, LIMIT_S, arena_bytes=way.arena_bytes))
        limit = timedelta(seconds=LIMIT_S)
        store = connect_store(store_port, limit)
        dist.init_process_group(GLOO, store=store, rank=self._rank, world_size=self._size, timeout=limit)
        self._systems[GLOO] = Gloo()

    def time(self, system: str, collective: str, nbytes: int, repeats: int, start_at: float) -> tuple[float, float]:
        """When this rank began and ended `repeats` collectives. Raises ArithmeticError for a wrong result."""
        part = torch.empty(max(1, nbytes // ELEMENT_BYTES // self._size))
        whole = torch.empty(part.numel() * self._size)
        used = self._systems[system]
        given = part if collective == "all-gather" else whole
        given.fill_(self._rank + 1)
        wait_until(start_at)
        begun = time.monotonic()
        for number in range(repeats):
            if number:
                given.fill_(self._rank + 1)  # only small tensors are repeated, for which this is nothing
            match collective:
                case "all-reduce":
                    used.all_reduce(whole)
                case "reduce-scatter":
                    used.reduce_scatter(part, whole)
                case _:
                    used.all_gather(whole, part)
        ended = time.monotonic()
        if not self._is_right(collective, part, whole):
            raise ArithmeticError(f"{system}: {collective} of {nbytes} bytes has a wrong result")
        return begun, ended

    def _is_right(self, collective: str, part: Tensor, whole: Tensor) -> bool:
        """Rank r has given r + 1 everywhere."""
        if collective == "all-gather":
            return all(bool((piece == rank + 1).all()) for rank, piece in enumerate(whole.chunk(self._size)))
        return bool(((part if collective == "reduce-scatter" else whole) == self._size * (self._size + 1) / 2).all())


def _lost(closed: PeerClosed) -> None:
    raise LinkClosed(f"worker {closed.peer} is gone: {closed.reason}")


def _ignore(peer: WorkerId, content: bytes) -> None:
    del peer, content
