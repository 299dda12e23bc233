"""One rank of a gang that loses one: groups of ours for the world, its row and its column, and gloo's for the same."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from ranks import connect_store, part_of, wait_until
from torch import Tensor

from elaswave.comm.fabric import Fabric
from elaswave.comm.group import Group
from elaswave.comm.operation import Operation
from elaswave.core.ids import WorkerId
from elaswave.errors import EpochChanged

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store

LIMIT = timedelta(seconds=60)
LARGE_BYTES = 1 << 20
SMALL_BYTES = 1 << 10
ELEMENT_BYTES = 4  # of float32


@dataclass(frozen=True, slots=True, kw_only=True)
class Grid:
    """Ranks in `rows` rows (of one data-parallel rank each), one per column (of one pipeline stage each)."""

    rows: int
    columns: int

    def lines(self) -> dict[str, list[int]]:
        """All rows and columns, in the order in which every rank makes the groups."""
        across = {f"row {row}": [row * self.columns + c for c in range(self.columns)] for row in range(self.rows)}
        down = {f"column {c}": [row * self.columns + c for row in range(self.rows)] for c in range(self.columns)}
        return {**across, **down}

    def groups_of(self, rank: int) -> dict[str, list[int]]:
        """The world, and the lines of a rank."""
        mine = {name: ranks for name, ranks in self.lines().items() if rank in ranks}
        return {"world": list(range(self.rows * self.columns)), **mine}


@dataclass(frozen=True, slots=True, kw_only=True)
class Recovery:
    """How one survivor got over the loss; times of the monotonic clock.

    decided_at: the roster of the store got the loss, or was found to have it; None: a peer has told. out_at: all
    operations of groups that lost a member have ended. ended_at: so have their first all-reduces of the new epoch.
    """

    decided_at: float | None
    out_at: float
    ended_at: float
    dials: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Running:
    """An all-reduce of ones among `total` ranks."""

    operation: Operation
    tensor: Tensor
    total: int


class WatchedStore:
    """A store that remembers when its first compare-and-set was through: nothing but the roster uses that."""

    def __init__(self, store: "Store") -> None:
        self._store = store
        self.decided_at: float | None = None

    def get(self, key: str, /) -> bytes:
        return self._store.get(key)

    def set(self, key: str, value: str, /) -> None:
        self._store.set(key, value)

    def wait(self, keys: list[str], timeout: timedelta, /) -> None:
        self._store.wait(keys, timeout)

    def compare_set(self, key: str, expected: str, desired: str, /) -> bytes:
        found = self._store.compare_set(key, expected, desired)
        self.decided_at = self.decided_at or time.monotonic()
        return found


class EditRank:
    """Its methods are called by the benchmark, on all ranks at once."""

    def __init__(self, rank: int, grid: Grid, arena_bytes: int) -> None:
        """arena_bytes: shared memory of a rank and group; 0: all goes over Unix sockets."""
        self._rank = rank
        self._grid = grid
        self._arena_bytes = arena_bytes
        self._small = torch.empty(SMALL_BYTES // ELEMENT_BYTES)
        self._large: dict[str, Tensor] = {}
        self._groups: dict[str, Group] = {}
        self._gloo: list[dist.ProcessGroup] = []

    def connect(self, store_port: int, start_at: float) -> tuple[float, float]:
        """Become a client of the store."""
        wait_until(start_at)
        begun = time.monotonic()
        self._store = connect_store(store_port, LIMIT)
        return begun, time.monotonic()

    def set_up(self) -> None:
        """Make all groups, ours and gloo's, and use each of them."""
        self._watched = WatchedStore(part_of(self._store, "ours"))
        size = self._grid.rows * self._grid.columns
        self._fabric = Fabric(self._watched, self._rank, size, LIMIT)
        for name, ranks in self._grid.groups_of(self._rank).items():
            made = self._fabric.communicator(name, [WorkerId(rank) for rank in ranks])
            self._groups[name] = Group(
                self._fabric.endpoint, made, LIMIT.total_seconds(), arena_bytes=self._arena_bytes
            )
            self._large[name] = torch.empty(LARGE_BYTES // ELEMENT_BYTES)
        for name, group in self._groups.items():
            self._reduce_small(group)
            self._succeeds(self._start_large(name))
        self._make_gloo("gloo/first", list(range(size)))

    # ------------------------------------------------------------------ ours

    def train(self) -> Recovery:
        """All-reduces in all groups until a rank of the world is lost; then one in each group that it was in."""
        before = self._fabric.endpoint.statistics().dials
        while True:
            running = {name: self._start_large(name) for name in self._groups}
            if not self._succeeds(running["world"]):
                break
            # Where one of these fails and the world has not, others work on, and so must this rank: until it fails too.
            for name in self._groups.keys() - {"world"}:
                self._succeeds(running[name])
        edited = self._edited()
        for name in edited.keys() - {"world"}:
            self._succeeds(running[name])
        out_at = time.monotonic()
        self._fabric.reconfigure()
        for group in edited.values():
            self._reduce_small(group)
        ended_at = time.monotonic()
        dials = self._fabric.endpoint.statistics().dials - before
        for name in self._groups.keys() - edited.keys():
            self._succeeds(running[name])
        return Recovery(decided_at=self._watched.decided_at, out_at=out_at, ended_at=ended_at, dials=dials)

    def _edited(self) -> dict[str, Group]:
        """Those that have lost a member. The others begin anew, too, with the members that they had."""
        whole = self._grid.groups_of(self._rank)
        return {name: group for name, group in self._groups.items() if group.communicator.size < len(whole[name])}

    def _start_large(self, name: str) -> Running:
        group, tensor = self._groups[name], self._large[name].fill_(1.0)
        return Running(operation=group.all_reduce(tensor), tensor=tensor, total=group.communicator.size)

    def _succeeds(self, running: Running) -> bool:
        """Whether it does. Raises ArithmeticError for a wrong result."""
        try:
            self._fabric.endpoint.wait(running.operation)
        except EpochChanged:
            return False
        if [float(running.tensor[0]), float(running.tensor[-1])] != [running.total] * 2:
            raise ArithmeticError(f"an all-reduce among {running.total} ranks has a wrong result")
        return True

    def _reduce_small(self, group: Group) -> None:
        self._small.fill_(1.0)
        self._fabric.endpoint.wait(group.all_reduce(self._small))
        if not bool((self._small == group.communicator.size).all()):
            raise ArithmeticError(f"an all-reduce of {group.communicator.name} has a wrong result")

    def undisturbed(self, start_at: float) -> tuple[float, float]:
        """The same all-reduces again, when nothing is amiss."""
        wait_until(start_at)
        begun = time.monotonic()
        for group in self._edited().values():
            self._reduce_small(group)
        return begun, time.monotonic()

    # ------------------------------------------------------------------ gloo

    def rebuild_partly(self, dead: int, start_at: float) -> tuple[float, float]:
        """New groups for those that the dead rank was in, and one all-reduce in each."""
        wait_until(start_at)
        begun = time.monotonic()
        made: list[dist.ProcessGroupGloo] = []
        for name, ranks in self._grid.groups_of(dead).items():
            left = [rank for rank in ranks if rank != dead]
            if self._rank in left:
                store = part_of(self._store, f"gloo/partly/{name}")
                made.append(dist.ProcessGroupGloo(store, left.index(self._rank), len(left), LIMIT))
        for group in made:
            group.allreduce([self._small.fill_(1.0)]).wait()  # type: ignore[attr-defined]
        return begun, time.monotonic()

    def rebuild_fully(self, dead: int, start_at: float) -> tuple[float, float]:
        """Destroy all groups and make them again without the dead rank, and one all-reduce in each."""
        left = [rank for rank in range(self._grid.rows * self._grid.columns) if rank != dead]
        wait_until(start_at)
        begun = time.monotonic()
        self._gloo.clear()
        dist.destroy_process_group()
        self._make_gloo("gloo/fully", left)
        return begun, time.monotonic()

    def _make_gloo(self, prefix: str, alive: Sequence[int]) -> None:
        store = part_of(self._store, prefix)
        place = {rank: index for index, rank in enumerate(alive)}
        dist.init_process_group("gloo", store=store, rank=place[self._rank], world_size=len(alive), timeout=LIMIT)
        dist.all_reduce(self._small.fill_(1.0))
        for ranks in self._grid.lines().values():
            group = dist.new_group([place[rank] for rank in ranks if rank in place], timeout=LIMIT)
            if self._rank in ranks:
                self._gloo.append(group)
        for group in self._gloo:
            dist.all_reduce(self._small.fill_(1.0), group=group)
