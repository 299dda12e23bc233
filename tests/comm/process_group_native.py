"""Jobs with a native communicator beside the elastic group: gloo in the part of NCCL."""

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from elaswave.comm.grid_group import GridGroup
from elaswave.comm.native import GlooCommunicator, HybridGroup, NativeCommunicator, NativeEditor, NativeFactory
from elaswave.comm.nccl import NcclEditor
from elaswave.core.native_edits import NativeAbilities
from elaswave.errors import EpochChanged, PeerError
from tests.comm.process_group_place import LIMIT_S, Place, die, job, joined

STEPS = 12
TENSORS = 3
ELEMENTS = 50_000


def gloo(place: Place, name: str, rank: int, size: int) -> NativeCommunicator:
    store = dist.FileStore(str(place.folder / name.replace("/", "-")), size)
    return GlooCommunicator(store, rank, size, LIMIT_S)


@dataclass(eq=False)
class GlooHandle:
    """A group of gloo, and the thread that makes it."""

    path: str
    rank: int
    size: int
    maker: threading.Thread | None = None
    group: dist.ProcessGroupGloo | None = None
    error: RuntimeError | None = None


class ShrinkableGloo:
    """gloo with the calls of NCCL: a shrink makes another group of who is left, behind the caller."""

    abilities = NativeAbilities(shrink=True)

    def __init__(self, place: Place) -> None:
        self._place = place
        self.shrinks = 0

    def unique_id(self, parent: GlooHandle | None) -> bytes:
        return f"made-{time.monotonic_ns()}".encode()

    def init_rank(self, size: int, rank: int, unique_id: bytes) -> GlooHandle:
        return self._started(GlooHandle(path=unique_id.decode(), rank=rank, size=size))

    def shrink(self, parent: GlooHandle, excluded: tuple[int, ...], *, abort_in_flight: bool) -> GlooHandle:
        self.shrinks += 1
        assert abort_in_flight
        rank = parent.rank - sum(other < parent.rank for other in excluded)
        path = f"{parent.path}-without-{'-'.join(map(str, excluded))}"
        return self._started(GlooHandle(path=path, rank=rank, size=parent.size - len(excluded)))

    def revoke(self, communicator: GlooHandle) -> None:
        raise AssertionError("it cannot")

    def grow(self, parent: GlooHandle | None, size: int, rank: int | None, unique_id: bytes | None) -> GlooHandle:
        raise AssertionError("it cannot")

    def in_progress(self, communicator: GlooHandle) -> bool:
        if communicator.error is not None:
            raise PeerError(str(communicator.error))
        return communicator.group is None

    def abort(self, communicator: GlooHandle) -> None:
        return None  # gloo cannot; it is left to time out

    def all_reduce(self, communicator: GlooHandle, tensor: Tensor) -> Callable[[], bool]:
        assert communicator.group is not None
        work: dist.Work = communicator.group.allreduce([tensor])  # type: ignore[attr-defined]

        def has_ended() -> bool:
            try:
                return work.is_completed() and work.wait()
            except RuntimeError as error:
                raise PeerError(str(error)) from error

        return has_ended

    def _started(self, handle: GlooHandle) -> GlooHandle:
        def make() -> None:
            store = dist.FileStore(str(self._place.folder / handle.path), handle.size)
            try:
                handle.group = dist.ProcessGroupGloo(store, handle.rank, handle.size, timedelta(seconds=LIMIT_S))
            except RuntimeError as error:
                handle.error = error

        handle.maker = threading.Thread(target=make, daemon=True)
        handle.maker.start()
        return handle


def given(worker: int, step: int, index: int) -> Tensor:
    return torch.full((ELEMENTS,), float(1 + worker + 10 * step + 1000 * index))


def expected(workers: list[int], step: int, index: int) -> float:
    return float(sum(1 + worker + 10 * step + 1000 * index for worker in workers))


def run_step(place: Place, group: HybridGroup, step: int, dies: bool) -> list[float]:
    found = []
    for index in range(TENSORS):
        tensor = given(place.rank, step, index)
        if dies and index == 1:
            if group._native is not None:
                group._native.all_reduce(tensor)
            die()
        group.all_reduce(tensor)
        assert tensor.unique().numel() == 1
        found.append(float(tensor[0]))
    group.boundary()
    return found


@job
def swap_and_lose(place: Place) -> object:
    """Every step's sums are those of its survivors; where they went over is told: E for elastic, N for native."""
    return steps_over_a_loss(place, lambda name, rank, size: gloo(place, name, rank, size))


@job
def edit_and_lose(place: Place) -> object:
    """The same with a native communicator that is edited; also how many shrinks there were."""
    library = ShrinkableGloo(place)
    store = dist.FileStore(str(place.folder / "identities"), place.size)
    return steps_over_a_loss(place, NcclEditor(library, store, LIMIT_S)), library.shrinks


def steps_over_a_loss(place: Place, factory: NativeFactory | NativeEditor) -> str:
    ways = ""
    with joined(place) as group:
        everybody, survivors = list(range(place.size)), [0, 2, 3]
        hybrid = group.hybrid(factory)
        hybrid.rearm()
        step = 0
        while step < STEPS:
            if step in (2, 9):
                assert hybrid.built(time.monotonic() + LIMIT_S), hybrid.build_error
            way = "N" if hybrid.is_native else "E"
            try:
                found = run_step(place, hybrid, step, dies=place.rank == 1 and step == place.arguments["dies_at"])
            except EpochChanged:
                if place.arguments.get("too_early"):
                    hybrid.rearm()
                    assert not hybrid.built(time.monotonic()), "not before the members are agreed on"
                group.reconfigure()
                hybrid.rearm()
                continue
            members = everybody if group.size() == place.size else survivors
            assert found == [expected(members, step, index) for index in range(TENSORS)], (step, found)
            ways += way
            step += 1
        hybrid.close()
        assert not hybrid.is_native
        assert hybrid.edit_error is None
    return ways


@job
def grid_and_lose(place: Place) -> object:
    """Sums over a grid of 2 x 3; `deaths` by step. How each step's sums went, and how many communicators were made."""
    deaths = {int(step): rank for step, rank in place.arguments["deaths"].items()}
    made: list[str] = []
    ways = ""

    def make(name: str, rank: int, size: int) -> NativeCommunicator:
        made.append(name)
        return gloo(place, name, rank, size)

    with joined(place) as group:
        grid = group.grid(make)
        grid.arm()
        step, alive = 0, set(range(place.size))
        while step < STEPS:
            if step in (0, 8):
                assert grid.built(time.monotonic() + LIMIT_S)
            way = "N" if grid.is_native else "E"
            try:
                found = grid_step(place, grid, step, dies=deaths.get(step) == place.rank)
            except EpochChanged:
                group.reconfigure()
                grid.resume()
                alive.discard(deaths[step])
                continue
            assert found == [expected(sorted(alive), step, index) for index in range(TENSORS)], (step, found)
            ways += way
            step += 1
            if step == 8:
                made_before = len(made)
                grid.arm()
        grid.close()
    return ways, made_before


def grid_step(place: Place, grid: GridGroup, step: int, dies: bool) -> list[float]:
    found = []
    for index in range(TENSORS):
        if dies and index == place.arguments["index"]:
            die()
        tensor = given(place.rank, step, index)
        grid.all_reduce(tensor)
        assert tensor.unique().numel() == 1
        found.append(float(tensor[0]))
    grid.boundary()
    return found


class Failing:
    """Fails although everybody lives."""

    def all_reduce(self, tensor: Tensor) -> torch.futures.Future[list[Tensor]]:
        future: torch.futures.Future[list[Tensor]] = torch.futures.Future()
        future.set_exception(RuntimeError("the fabric is on fire"))
        return future

    def abort(self) -> None:
        return None


@job
def fail_alive(place: Place) -> object:
    """A native communicator that fails without a loss is named; the elastic group goes on."""
    with joined(place) as group:
        hybrid = group.hybrid(lambda name, rank, size: Failing())
        hybrid.rearm()
        assert hybrid.built(time.monotonic() + LIMIT_S)
        assert hybrid.boundary()
        try:
            hybrid.all_reduce(torch.ones(3))
        except PeerError as error:
            said = str(error)
        hybrid.rearm()
        tensor = torch.ones(3)
        hybrid.all_reduce(tensor)
        assert tensor.tolist() == [place.size] * 3
    return said


@job
def never_built(place: Place) -> object:
    """One rank cannot build: nobody swaps, and it knows why."""

    def refuse(name: str, rank: int, size: int) -> NativeCommunicator:
        raise PeerError("no such device")

    with joined(place) as group:
        hybrid = group.hybrid(refuse if place.rank == 1 else lambda name, rank, size: Failing())
        hybrid.rearm()
        hybrid.built(time.monotonic() + LIMIT_S)
        assert not hybrid.boundary()
        return str(hybrid.build_error)
