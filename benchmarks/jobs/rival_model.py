"""The model and the log of steps that all systems of benchmarks/rivals.py share. Needs torch and nothing of ours."""

import json
import os
import time
from pathlib import Path

import torch
from torch import Tensor, nn

WIDTH = 256
DEPTH = 4
WORLD = 4
SAMPLES_EACH = 30
STEP_S = 0.05
"""What a step's share of one of four workers takes on the emulated device."""


def make_layers() -> list[nn.Module]:
    """A perceptron of 0.26 million parameters, layer by layer."""
    torch.manual_seed(0)
    hidden = [nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU()) for _ in range(DEPTH)]
    return [*hidden, nn.Linear(WIDTH, 1)]


def loss_of(output: Tensor) -> Tensor:
    """Mean square of the output."""
    return output.square().mean()


class StepLog:
    """Appends one JSON line per event; a line that was written survives SIGKILL. Times are CLOCK_MONOTONIC seconds."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = -1

    def write(self, kind: str, **values: float) -> None:
        """Write an event of this process."""
        if self._file < 0:
            self._file = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
        line = json.dumps({"kind": kind, "at": time.monotonic(), "pid": os.getpid(), **values})
        os.write(self._file, f"{line}\n".encode())


def batches(rank: int) -> torch.Generator:
    """The source of a rank's samples."""
    return torch.Generator().manual_seed(1000 + rank)


def next_batch(source: torch.Generator) -> Tensor:
    """One step's samples of one rank."""
    return torch.randn(SAMPLES_EACH, WIDTH, generator=source)
