"""ElasWave's side of benchmarks/rivals.py: the shared model under elaswave-launch; every step is written down."""

import argparse
import os
import time
from pathlib import Path

import torch
from rival_model import SAMPLES_EACH, STEP_S, WIDTH, WORLD, StepLog, loss_of, make_layers
from torch import Tensor, nn

import elaswave as ew
from elaswave.core.events import StepResult

MICRO_BATCHES = 12
"""They divide evenly over four workers and over three."""


class Device(nn.Module):
    """Takes the device's time for one micro-batch, then runs the layer."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, value: Tensor) -> Tensor:
        """As the layer does."""
        time.sleep(STEP_S * WORLD / MICRO_BATCHES)  # the emulated device
        result: Tensor = self.layer(value)
        return result


class Samples:
    """Random samples; the loader seeds the generator from the index."""

    def __len__(self) -> int:
        return 1_000_000

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return torch.randn(WIDTH), torch.zeros(1)


class LoggedSteps:
    """Writes down each step as the system tells it."""

    def __init__(self, log: StepLog) -> None:
        self._log = log

    def __call__(self, result: StepResult) -> None:
        self._log.write("step", step=result.step)


def main() -> None:
    """Train until stopped."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--events", type=Path, required=True, help="folder for the log of steps")
    found = parser.parse_args()
    first, *others = make_layers()
    log = StepLog(found.events / f"{os.environ['ELASWAVE_WORKER']}.jsonl")
    ew.train(
        ew.Job(
            layers=[Device(first), *others],
            loss=lambda output, target: loss_of(output),
            data=Samples(),
            optimizer=ew.AdamW(lr=1e-3),
            global_batch=SAMPLES_EACH * WORLD,
            micro_batch=SAMPLES_EACH * WORLD // MICRO_BATCHES,
            steps=1_000_000,
            on_step=LoggedSteps(log),
        )
    )


if __name__ == "__main__":
    main()
