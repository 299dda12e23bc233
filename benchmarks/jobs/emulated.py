"""A job whose device is emulated: a layer computes a little and then sleeps for the time that a device would take.

Sleeping leaves the processors free, so many workers fit on few cores and what is measured is the system around the
compute. Every instruction (one layer, one micro-batch, one direction) is recorded where it begins and ends; the sample
number travels in channel 0 through all layers, so the record names the work whoever does it.
"""

import argparse
import os
import struct
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import elaswave as ew
from elaswave.core.events import StepResult

RECORD = struct.Struct("<dIHBB")
"""CLOCK_MONOTONIC seconds, sample, layer, backward (0 or 1), end (0 or 1)."""

SEED = 1


class Recorder:
    """Appends records to a file of this worker; a record that was written survives SIGKILL."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._file = -1

    def write(self, sample: int, layer: int, *, backward: bool, end: bool) -> None:
        """Record that an instruction begins or ends now."""
        if self._file < 0:
            name = f"{os.environ.get('ELASWAVE_WORKER', 'alone')}-{os.getpid()}.records"
            self._file = os.open(self._folder / name, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
        os.write(self._file, RECORD.pack(time.monotonic(), sample, layer, backward, end))


class BackwardTime(torch.autograd.Function):
    """The identity; its backward pass takes the device's time."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, layer: "EmulatedLayer", sample: int) -> Tensor:  # noqa: ANN401 - as torch has it
        """Keep what the backward pass has to know."""
        ctx.layer, ctx.sample = layer, sample
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:  # noqa: ANN401 - as torch has it
        """Take the time, pass the gradient on."""
        ctx.layer.instruction(ctx.sample, backward=True)
        return gradient, None, None


class EmulatedLayer(nn.Module):
    """Channel 0 is the sample's number and passes through; the others go through a small residual layer."""

    def __init__(self, number: int, options: argparse.Namespace, recorder: Recorder) -> None:
        super().__init__()
        self.mix = nn.Linear(options.width, options.width)
        self._number = number
        self._seconds = (options.forward_ms / 1e3, options.backward_ms / 1e3)
        self._recorder = recorder

    def instruction(self, sample: int, *, backward: bool) -> None:
        """The device's part of one pass."""
        self._recorder.write(sample, self._number, backward=backward, end=False)
        time.sleep(self._seconds[backward])  # the emulated device
        self._recorder.write(sample, self._number, backward=backward, end=True)

    def forward(self, value: Tensor) -> Tensor:
        """(B, 1 + width) -> (B, 1 + width)."""
        sample = int(value[0, 0])
        features = value[:, 1:]
        result = torch.cat((value[:, :1], features + torch.tanh(self.mix(features)) / 10), dim=1)
        self.instruction(sample, backward=False)
        passed: Tensor = BackwardTime.apply(result, self, sample)  # type: ignore[no-untyped-call]
        return passed


class NumberedSamples:
    """Map-style data set; channel 0 of a sample is its number, exact in float32 up to 2^24."""

    def __init__(self, samples: int, width: int) -> None:
        self._samples = samples
        self._width = width

    def __len__(self) -> int:
        return self._samples

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        sample = torch.full((1 + self._width,), index % 7 / 7.0)
        sample[0] = index
        return sample, torch.zeros(1)


def mean_square(output: Tensor, target: Tensor) -> Tensor:
    """The sample's number takes no part."""
    del target
    return output[:, 1:].square().mean()


class FirstStep:
    """Writes when the first step was done, CLOCK_MONOTONIC seconds, to a file; the first worker to know it counts."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __call__(self, result: StepResult) -> None:
        if result.step == 0 and not self._path.exists():
            self._path.write_text(repr(time.monotonic()))


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--width", type=int, default=16)
    parser.add_argument("--micro-batches", type=int, default=16)
    parser.add_argument("--forward-ms", type=float, default=0.0)
    parser.add_argument("--backward-ms", type=float, default=0.0)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--ballast-gib", type=float, default=0.0, help="memory that each worker holds besides")
    parser.add_argument("--records", type=Path, required=True, help="folder for records")
    parser.add_argument("--first-step", type=Path, help="file for the time at which the first step was done")
    return parser.parse_args()


def main() -> None:
    """Train."""
    options = parse()
    recorder = Recorder(options.records)
    samples = options.micro_batches * options.steps
    ballast = bytearray(b"\1") * int(options.ballast_gib * 2**30)  # written, so that it is there
    ew.train(
        ew.Job(
            layers=[partial(EmulatedLayer, number, options, recorder) for number in range(options.layers)],
            loss=mean_square,
            data=NumberedSamples(samples, options.width),
            optimizer=ew.AdamW(lr=1e-3),
            global_batch=options.micro_batches,
            steps=options.steps,
            seed=SEED,
            on_step=FirstStep(options.first_step) if options.first_step else None,
        )
    )
    del ballast


if __name__ == "__main__":
    main()
