"""A job of collectives of all kinds, one a step, while ranks are lost."""

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from elaswave.errors import EpochChanged
from tests.comm.process_group_jobs import same
from tests.comm.process_group_place import Place, die_after, job, joined
from tests.comm.process_group_training import members

SMALL, LARGE, PIECES = 500, 50_000, 700_000  # elements of float64: one barrier, two, and two for each piece of 4 MB

Step = Callable[[Tensor, list[float]], tuple[Tensor, Tensor]]
"""(own contribution, the value of every rank's one) -> what was found, and what it has to be."""


def reduced(mine: Tensor, values: list[float]) -> tuple[Tensor, Tensor]:
    dist.all_reduce(mine)
    return mine, torch.full_like(mine, sum(values))


def gathered(mine: Tensor, values: list[float]) -> tuple[Tensor, Tensor]:
    found = torch.empty(len(values), len(mine), dtype=mine.dtype)
    dist.all_gather_single(found, mine[None])
    return found, torch.tensor(values, dtype=mine.dtype)[:, None].expand_as(found)


def scattered(mine: Tensor, values: list[float]) -> tuple[Tensor, Tensor]:
    found = torch.empty(len(mine), dtype=mine.dtype)
    dist.reduce_scatter_single(found, mine.repeat(len(values)))
    return found, torch.full_like(found, sum(values))


def told(mine: Tensor, values: list[float]) -> tuple[Tensor, Tensor]:
    dist.broadcast(mine, 0)
    return mine, torch.full_like(mine, values[0])


STEPS: tuple[tuple[Step, int], ...] = (
    (reduced, SMALL),
    (reduced, LARGE),
    (gathered, SMALL),
    (reduced, SMALL),
    (reduced, PIECES),
    (told, SMALL),
    (scattered, LARGE),
    (reduced, LARGE),
    (told, LARGE),
    (reduced, SMALL),
)


@job
def works_on(place: Place) -> object:
    """A collective a step on whoever is left; returns the members of each. "losses" are [worker, step, lines]."""
    history: list[list[int]] = []
    with joined(place) as group:
        while len(history) < len(STEPS):
            index = len(history)
            for worker, step, lines in place.arguments["losses"]:
                if (worker, step) == (place.rank, index):
                    die_after(group, lines)
            work, length = STEPS[index]
            try:
                present = members(group)
                values = [float((worker + 1) * (index + 1)) for worker in present]
                mine = torch.full((length,), float((place.rank + 1) * (index + 1)), dtype=torch.float64)
                same(*work(mine, values), (index, present))
                history.append(present)
            except EpochChanged:
                group.reconfigure()
        dist.barrier()
    return history
