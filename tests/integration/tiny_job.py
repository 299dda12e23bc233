"""A job of a few thousand parameters with everything in it that tests of real processes need; also a script.

Its flags choose the numbers, and faults of the user's own: a script, data set or layer that raises, values that are
not finite, a node whose agent dies.
"""

import argparse
import os
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import partial
from typing import Literal

import psutil
import torch
from torch import Tensor, nn
from torch.nn import functional

from elaswave import AdamW, Job, train
from elaswave.core.events import StepResult

WORDS = 64
POISON = WORDS
"""A token whose embedding is infinite; one sample in `POISON_EVERY` of a poisoned data set begins with it."""

POISON_EVERY = 40
WIDTH = 64
"""With it every layer is cut into as many shards as there are replicas: all workers own something."""

LENGTH = 8
SAMPLES = 5000


@dataclass(frozen=True, slots=True, kw_only=True)
class TinyOptions:
    """What decides the bits of the job, in the order of its flags; all have defaults."""

    layers: int = 7
    dropout: float = 0.0
    tied: int = 0
    recompute: int = 0
    dtype: Literal["float32", "bfloat16"] = "float32"
    clip: float = 0.0
    steps: int = 8
    seed: int = 1
    global_batch: int = 8
    micro_batch: int = 1
    poison: int = 0
    non_finite: Literal["raise", "skip-step"] = "raise"
    accumulation: Literal["exact64", "float32"] = "exact64"

    def flags(self) -> list[str]:
        """The command line of a script that trains this job."""
        return [f"--{field.name.replace('_', '-')}={getattr(self, field.name)}" for field in fields(self)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Faults:
    """What the script does wrong. Empty texts and negative numbers: nothing."""

    raise_at: str = ""
    """start, data, layer, loss or on_step."""

    kill_node: str = ""
    """Name of the node whose agent is killed after so many forward passes of blocks in one of its workers."""

    after_forwards: int = 0
    print_steps: int = 0


class Tokens:
    """Samples of token ids that depend on the index, and on the generator that the loader seeds."""

    def __init__(self, options: TinyOptions, faults: Faults) -> None:
        self._poison = bool(options.poison)
        self._raises = faults.raise_at == "data"

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        if self._raises and index % POISON_EVERY == 0:
            raise ValueError(f"sample {index} is broken")
        tokens = torch.randint(0, WORDS, (LENGTH + 1,))
        tokens[0] = index % WORDS
        source = tokens[:-1].clone()
        if self._poison and index % POISON_EVERY == 0:
            source[0] = POISON
        return source, tokens[1:]


class ForwardCount:
    """Counts forward passes of this process and causes what is due at one of them."""

    def __init__(self, faults: Faults) -> None:
        self._faults = faults
        self._passes = 0

    def one_more(self) -> None:
        """Called by every block."""
        self._passes += 1
        if self._faults.raise_at == "layer" and self._passes > 20:
            raise ValueError("the layer is broken")
        if self._passes == self._faults.after_forwards and os.environ.get("ELASWAVE_NODE") == self._faults.kill_node:
            os.kill(own_agent(), signal.SIGKILL)


def own_agent() -> int:
    """Process id of the agent that this worker belongs to."""
    wanted = {f"--run-dir={os.environ['ELASWAVE_RUN_DIR']}", f"--node={os.environ['ELASWAVE_NODE']}"}
    for process in psutil.process_iter(["cmdline"]):
        if wanted <= set(process.info["cmdline"] or ()):
            return int(process.pid)
    raise LookupError(f"no agent with {wanted}")


class Embedding(nn.Module):
    def __init__(self, options: TinyOptions) -> None:
        super().__init__()
        self.table = nn.Embedding(WORDS + 1, WIDTH)
        self.poisoned = bool(options.poison)

    def forward(self, tokens: Tensor) -> Tensor:
        value = self.table(tokens)
        return value / (tokens != POISON).to(value.dtype)[..., None] if self.poisoned else value


class Block(nn.Module):
    """A residual block with a norm, a matrix product and dropout: small, as steps have to be short."""

    def __init__(self, options: TinyOptions, count: ForwardCount) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.mix = nn.Linear(WIDTH, WIDTH)
        self._dropout = options.dropout
        self._count = count

    def forward(self, value: Tensor) -> Tensor:
        self._count.one_more()
        inner = torch.tanh(self.mix(self.norm(value)))
        return value + functional.dropout(inner, self._dropout) if self._dropout else value + inner


class Head(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scores = nn.Linear(WIDTH, WORDS + 1, bias=False)

    def forward(self, value: Tensor) -> Tensor:
        return self.scores(value)


def next_token_loss(scores: Tensor, target: Tensor) -> Tensor:
    return functional.cross_entropy(scores.float().flatten(0, 1), target.flatten())


def broken_loss(scores: Tensor, target: Tensor) -> Tensor:
    raise ValueError(f"the loss is broken for {scores.shape[0]} samples and {target.shape[0]} targets")


def show_step(result: StepResult) -> str:
    """A line that tests wait for."""
    return f"tiny step {result.step}"


def broken_callback(result: StepResult) -> str:
    raise ValueError(f"on_step is broken at step {result.step}")


def make_job(options: TinyOptions, faults: Faults | None = None) -> Job:
    """The job; with `layers` of them an embedding, blocks and a head."""
    chosen = faults or Faults()
    count = ForwardCount(chosen)
    blocks = [partial(Block, options, count)] * (options.layers - 2)
    places = ((0, "table.weight"), (options.layers - 1, "scores.weight"))
    callback = show_step if chosen.print_steps else None
    return Job(
        layers=[partial(Embedding, options), *blocks, Head],
        loss=broken_loss if chosen.raise_at == "loss" else next_token_loss,
        data=Tokens(options, chosen),
        optimizer=AdamW(lr=1e-2),
        global_batch=options.global_batch,
        micro_batch=options.micro_batch,
        steps=options.steps,
        seed=options.seed,
        clip_norm=options.clip or None,
        tied=(places,) if options.tied else (),
        recompute=bool(options.recompute),
        parameter_dtype=options.dtype,
        non_finite=options.non_finite,
        accumulation=options.accumulation,
        on_step=broken_callback if chosen.raise_at == "on_step" else callback,
    )


def read_flags(arguments: Sequence[str]) -> tuple[TinyOptions, Faults]:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    for values in (TinyOptions(), Faults()):
        for field in fields(values):
            default = getattr(values, field.name)
            parser.add_argument(f"--{field.name.replace('_', '-')}", type=type(default), default=default)
    found = vars(parser.parse_args(arguments))
    return (
        TinyOptions(**{field.name: found[field.name] for field in fields(TinyOptions)}),
        Faults(**{field.name: found[field.name] for field in fields(Faults)}),
    )


def main() -> None:
    options, faults = read_flags(sys.argv[1:])
    if faults.raise_at == "start":
        raise ValueError("the script is broken")
    train(make_job(options, faults))


if __name__ == "__main__":
    main()
