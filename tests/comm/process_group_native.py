"""Jobs with a native communicator beside the elastic group: gloo in the part of NCCL."""

import time

import torch
import torch.distributed as dist
from torch import Tensor

from elaswave.comm.native import GlooCommunicator, HybridGroup, NativeCommunicator
from elaswave.errors import EpochChanged, PeerError
from tests.comm.process_group_place import LIMIT_S, Place, die, job, joined

STEPS = 12
TENSORS = 3
ELEMENTS = 50_000


def gloo(place: Place, name: str, rank: int, size: int) -> NativeCommunicator:
    store = dist.FileStore(str(place.folder / name.replace("/", "-")), size)
    return GlooCommunicator(store, rank, size, LIMIT_S)


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
    ways = ""
    with joined(place) as group:
        everybody, survivors = list(range(place.size)), [0, 2, 3]
        hybrid = group.hybrid(lambda name, rank, size: gloo(place, name, rank, size))
        hybrid.rearm()
        step = 0
        while step < STEPS:
            if step in (2, 9):
                assert hybrid.built(time.monotonic() + LIMIT_S), hybrid.build_error
            way = "N" if hybrid.is_native else "E"
            try:
                found = run_step(place, hybrid, step, dies=place.rank == 1 and step == place.arguments["dies_at"])
            except EpochChanged:
                group.reconfigure()
                hybrid.rearm()
                continue
            members = everybody if group.size() == place.size else survivors
            assert found == [expected(members, step, index) for index in range(TENSORS)], (step, found)
            ways += way
            step += 1
        hybrid.close()
        assert not hybrid.is_native
    return ways


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
