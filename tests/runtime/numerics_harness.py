"""Small jobs for tests of the numerics, and a way to run snippets in fresh processes."""

import itertools
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from elaswave.core.exact import exact_to_float
from elaswave.core.ids import Layer, MicroBatch, Step
from elaswave.core.parameters import BlockLayout, block_layout
from elaswave.core.protocol.state import HopKey
from elaswave.job import AdamW, Job
from elaswave.runtime.data import MicroBatchLoader
from elaswave.runtime.description import describe_parameters
from elaswave.runtime.device import CpuDevice
from elaswave.runtime.hops import HopRunner
from elaswave.runtime.model import HostedModel

ROOT = Path(__file__).resolve().parent.parent.parent
WORDS = 32
WIDTH = 16
LENGTH = 8


class Tokens:
    """Samples of token ids that depend on the index, and on the generator that the loader seeds."""

    def __init__(self, samples: int = 64) -> None:
        self.samples = samples

    def __len__(self) -> int:
        return self.samples

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        tokens = torch.randint(0, WORDS, (LENGTH + 1,))
        tokens[0] = index % WORDS
        return tokens[:-1], tokens[1:]


class Embedding(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(WORDS, WIDTH)

    def forward(self, tokens: Tensor) -> Tensor:
        return functional.dropout(self.table(tokens), 0.1, self.training)


class Mixer(nn.Module):
    """A residual block with a matrix product, a norm, dropout and a transposed output."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up = nn.Linear(WIDTH, 3 * WIDTH)
        self.down = nn.Linear(3 * WIDTH, WIDTH)

    def forward(self, value: Tensor) -> Tensor:
        inner = functional.dropout(self.down(functional.gelu(self.up(self.norm(value)))), 0.2, self.training)
        # Not contiguous, as attention leaves it: what a layer gives must not depend on whether it went over a link.
        return (value + inner).transpose(1, 2).clone().transpose(1, 2)


class Head(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scores = nn.Linear(WIDTH, WORDS, bias=False)

    def forward(self, value: Tensor) -> Tensor:
        return self.scores(value)


def next_token_loss(scores: Tensor, target: Tensor) -> Tensor:
    return functional.cross_entropy(scores.float().flatten(0, 1), target.flatten())


TIED = (((0, "table.weight"), (3, "scores.weight")),)


def small_job(**changes: object) -> Job:
    """Embedding, two mixers, head; 4 micro-batches of 2 samples; 2 steps."""
    job = Job(
        layers=[Embedding, Mixer, Mixer, Head],
        loss=next_token_loss,
        data=Tokens(),
        optimizer=AdamW(lr=1e-2),
        global_batch=8,
        micro_batch=2,
        steps=2,
        seed=5,
    )
    return replace(job, **changes)


class Bench:
    """A worker's pieces for one job, all layers hosted."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.layout: BlockLayout = block_layout(describe_parameters(job))
        self.device = CpuDevice()
        self.model = HostedModel(job, self.layout, self.device)
        self.model.host(Layer(index) for index in range(len(job.layers)))
        self.loader = MicroBatchLoader(job)
        self.runner = HopRunner(job, self.model, self.loader, self.device)

    def run(
        self,
        cuts: tuple[int, ...] = (),
        *,
        step: int = 0,
        micro_batch: int = 0,
        carry: Callable[[Tensor], Tensor] = lambda value: value,
    ) -> list[Tensor]:
        """All values of one micro-batch cut at `cuts`: contributions by layer and block, then loss and samples.

        `carry` stands for what a link does to activations and gradients between hops.
        """
        edges = [0, *cuts, len(self.job.layers)]
        hops = [hop(first, last, step, micro_batch) for first, last in itertools.pairwise(edges)]
        value: Tensor | None = None
        loss = None
        for index, key in enumerate(hops):
            done = self.runner.forward(key, carry(value) if index and value is not None else value)
            value, loss = done.output, done.loss
        assert loss is not None
        found: dict[tuple[int, int], Tensor] = {}
        gradient: Tensor | None = None
        for index, key in enumerate(reversed(hops)):
            back = self.runner.backward(key, carry(gradient) if index and gradient is not None else gradient)
            gradient = back.input_gradient
            for part in back.contributions:
                found |= {(part.layer, block): gradient.flat() for block, gradient in part.blocks.items()}
        parts = [found[key] for key in sorted(found)]
        scalars = [torch.tensor(exact_to_float(loss.loss), dtype=torch.float64), torch.tensor(loss.samples % 2**62)]
        return [*parts, *scalars]


def hop(first: int, last: int, step: int = 0, micro_batch: int = 0) -> HopKey:
    return HopKey(step=Step(step), micro_batch=MicroBatch(micro_batch), first=Layer(first), last=Layer(last))


def same_bits(left: list[Tensor], right: list[Tensor]) -> bool:
    """Equal shapes, types and bytes; -0 and +0 differ, equal NaNs do not."""
    return len(left) == len(right) and all(
        one.shape == two.shape and one.dtype == two.dtype and _bytes(one) == _bytes(two)
        for one, two in zip(left, right, strict=True)
    )


def _bytes(tensor: Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def in_fresh_process(code: str, **environment: str) -> str:
    """Standard output of `code` run by a new interpreter with this folder and the packages importable."""
    paths = os.pathsep.join([str(ROOT), str(Path(__file__).parent), str(ROOT / "examples")])
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": paths, **environment},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout
