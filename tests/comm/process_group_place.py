"""What the jobs of the tests of the process group share: who a rank is, how it joins, how it dies."""

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor

from elaswave.comm.communicator import AGREEMENT, Communicator
from elaswave.comm.process_group import ElasticProcessGroup
from elaswave.core.ids import WorkerId

LIMIT_S = 20.0
"""Of one operation; far beyond what anything here takes."""

IN_AGREEMENT = -1
"""Frames after which a rank dies: just before it says anything about another rank's loss."""


@dataclass(frozen=True, kw_only=True)
class Place:
    rank: int
    size: int
    folder: Path
    arguments: dict[str, Any]


Job = Callable[[Place], object]
JOBS: dict[str, Job] = {}


def job(function: Job) -> Job:
    JOBS[function.__name__] = function
    return function


@contextmanager
def joined(place: Place, limit_s: float = LIMIT_S) -> Iterator[ElasticProcessGroup]:
    """The default group."""
    store = dist.FileStore(str(place.folder / "store"), place.size)
    dist.init_process_group(
        "elastic", store=store, rank=place.rank, world_size=place.size, timeout=timedelta(seconds=limit_s)
    )
    group = dist.group.WORLD
    assert isinstance(group, ElasticProcessGroup)
    yield group
    dist.destroy_process_group()


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def die_after(group: ElasticProcessGroup, frames: int) -> None:
    """SIGKILL this process once it has sent so many frames of a collective."""
    communicator = group._group.communicator
    transmit = communicator._transmit
    sent = 0

    def counted(member: WorkerId, found: Communicator, number: int, tensor: Tensor) -> None:
        nonlocal sent
        if sent == frames or (frames == IN_AGREEMENT and number == AGREEMENT):
            die()
        transmit(member, found, number, tensor)
        sent += 1

    communicator._transmit = counted
