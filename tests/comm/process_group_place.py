"""What the jobs of the tests of the process group share: who a rank is, how it joins, how it dies."""

import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import Any

import torch.distributed as dist
from torch import Tensor

from elaswave.comm import collectives
from elaswave.comm.communicator import AGREEMENT
from elaswave.comm.operation import Operation
from elaswave.comm.process_group import ElasticProcessGroup

LIMIT_S = 20.0
"""Of one operation; far beyond what anything here takes."""

IN_AGREEMENT = -1
"""Lines after which a rank dies: just before it says anything about another rank's loss."""

COLLECTIVES = str(Path(collectives.__file__).parent)


@dataclass(frozen=True, kw_only=True)
class Place:
    rank: int
    size: int
    folder: Path
    arguments: dict[str, Any]


Job = Callable[[Place], object]
TraceFunction = Callable[[FrameType, str, object], object]
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


def die_after(group: ElasticProcessGroup, lines: int) -> None:
    """SIGKILL this process once it has executed so many lines of collectives, whatever those go through."""
    communicator = group._group.communicator
    advance = communicator._advance
    executed = 0

    def trace(frame: FrameType, event: str, _: object) -> TraceFunction | None:
        nonlocal executed
        if not frame.f_code.co_filename.startswith(COLLECTIVES):
            return None
        if event == "line":
            if executed == lines:
                die()
            executed += 1
        return trace

    def traced(operation: Operation, answer: Tensor | None) -> None:
        if lines == IN_AGREEMENT and operation.number == AGREEMENT:
            die()
        sys.settrace(trace)
        try:
            advance(operation, answer)
        finally:
            sys.settrace(None)

    communicator._advance = traced
