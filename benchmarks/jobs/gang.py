"""Trains the transformer in four processes with torch's own parallelism, or with none of the communication.

ddp: DistributedDataParallel on gloo, gradients accumulated with no_sync before the last micro-batch.
pipeline: torch.distributed.pipelining, Schedule1F1B on gloo.
ddp-floor, pipeline-floor: the compute of these without communication, each process for itself; boundary values of the
pipeline are made up.

Rank 0 writes the seconds per step of the slowest rank to --out, as JSON.
"""

import argparse
import contextlib
import importlib
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import NoReturn

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from transformer import (
    LEARNING_RATE,
    LENGTH,
    MICRO_BATCH,
    MICRO_BATCHES,
    SEED,
    SIZES,
    layer_factories,
    micro_batches_of,
    next_token_loss,
)

from elaswave.core.layout import partition_layers
from elaswave.lifeline import end_with_parent
from elaswave.runtime.device import configure_numerics
from elaswave.runtime.memory import keep_freed_memory

WORLD = 4
LIMIT = timedelta(seconds=120)

Step = Callable[[int], None]


def optimizer_of(module: nn.Module, kind: str) -> torch.optim.Optimizer:
    """AdamW with the defaults that elaswave.AdamW has too; `fused` is the fastest form that torch has on CPU."""
    return torch.optim.AdamW(module.parameters(), lr=LEARNING_RATE, weight_decay=0.01, fused=kind == "fused" or None)


def make_ddp(rank: int, channels: int, optimizer_kind: str, *, communicate: bool) -> Step:
    """A step of this rank's share of the micro-batches."""
    torch.manual_seed(SEED)
    net = nn.Sequential(*[factory() for factory in layer_factories(channels)])
    model = DistributedDataParallel(net, gradient_as_bucket_view=True) if communicate else net
    optimizer = optimizer_of(net, optimizer_kind)
    mine = range(rank, MICRO_BATCHES, WORLD)

    def step(number: int) -> None:
        optimizer.zero_grad()
        for place, (tokens, target) in enumerate(micro_batches_of(number, mine)):
            last = place == len(mine) - 1
            quiet = (
                contextlib.nullcontext() if last or not isinstance(model, DistributedDataParallel) else model.no_sync()
            )
            with quiet:
                (next_token_loss(model(tokens), target) / len(mine)).backward()  # type: ignore[no-untyped-call]
        optimizer.step()

    return step


def stage_of(rank: int, channels: int) -> nn.Sequential:
    """The layers that ElasWave gives this stage."""
    factories = layer_factories(channels)
    stage = partition_layers(len(factories), WORLD)[rank]
    torch.manual_seed(SEED + rank)
    return nn.Sequential(*[factories[layer]() for layer in stage.layers])


def make_pipeline(rank: int, channels: int, optimizer_kind: str) -> Step:
    """A step of this rank's stage under torch's 1F1B schedule."""
    from torch.distributed.pipelining import PipelineStage, Schedule1F1B  # noqa: PLC0415 - seconds, only needed here

    module = stage_of(rank, channels)
    stage = PipelineStage(module, rank, WORLD, torch.device("cpu"))
    schedule = Schedule1F1B(stage, MICRO_BATCHES, loss_fn=next_token_loss)
    optimizer = optimizer_of(module, optimizer_kind)

    def whole_batch(number: int, which: int) -> Tensor:
        return torch.cat([pair[which] for pair in micro_batches_of(number, range(MICRO_BATCHES))])

    def step(number: int) -> None:
        optimizer.zero_grad()
        if rank == 0:
            schedule.step(whole_batch(number, 0))
        elif rank == WORLD - 1:
            schedule.step(target=whole_batch(number, 1), losses=[])
        else:
            schedule.step()
        optimizer.step()

    return step


def make_pipeline_floor(rank: int, channels: int, optimizer_kind: str) -> Step:
    """The compute of this rank's stage on made-up values."""
    module = stage_of(rank, channels)
    optimizer = optimizer_of(module, optimizer_kind)
    received = torch.randn(MICRO_BATCH, LENGTH, channels)
    gradient = torch.randn(MICRO_BATCH, LENGTH, channels) / 1e4

    def step(number: int) -> None:
        optimizer.zero_grad()
        for tokens, target in micro_batches_of(number, range(MICRO_BATCHES)):
            output = module(tokens if rank == 0 else received.detach().requires_grad_())
            if rank == WORLD - 1:
                (next_token_loss(output, target) / MICRO_BATCHES).backward()  # type: ignore[no-untyped-call]
            else:
                output.backward(gradient)
        optimizer.step()

    return step


def make_step(rank: int, found: argparse.Namespace) -> Step:
    """The step that the flags ask for."""
    channels = SIZES[found.size].channels
    match found.system:
        case "pipeline":
            return make_pipeline(rank, channels, found.optimizer)
        case "pipeline-floor":
            return make_pipeline_floor(rank, channels, found.optimizer)
        case _:
            return make_ddp(rank, channels, found.optimizer, communicate=found.system == "ddp")


def train(rank: int, found: argparse.Namespace, store: Path) -> None:
    """One process: warm up, wait for the others, train, tell the time of the slowest."""
    torch.set_num_threads(1)
    if found.system.endswith("floor"):
        # What ElasWave's workers have: a floor under them, not under torch as it comes.
        configure_numerics()
    if found.malloc == "kept":
        keep_freed_memory()
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=WORLD, timeout=LIMIT)
    step = make_step(rank, found)
    for number in range(found.warm_up):
        step(number)
    dist.barrier()
    began = time.monotonic()
    for number in range(found.warm_up, found.warm_up + found.steps):
        step(number)
    seconds = torch.tensor((time.monotonic() - began) / found.steps, dtype=torch.float64)
    dist.all_reduce(seconds, op=dist.ReduceOp.MAX)
    if rank == 0:
        found.out.write_text(json.dumps({"step_seconds": float(seconds)}))


def import_once(system: str) -> None:
    """What torch imports when it is first used, seconds of it, is imported before the processes part."""
    optimizer_of(nn.Linear(1, 1), "default")
    if system == "pipeline":
        importlib.import_module("torch.distributed.pipelining")


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--system", choices=("ddp", "pipeline", "ddp-floor", "pipeline-floor"), required=True)
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--warm-up", type=int, default=2)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--optimizer", choices=("fused", "default"), default="fused")
    parser.add_argument("--malloc", choices=("kept", "default"), default="default")
    parser.add_argument("--parent", type=int, default=0, help="end with this process")
    parser.add_argument("--out", type=Path, required=True)
    return parser.parse_args()


def run_process(rank: int, found: argparse.Namespace, store: Path, done: int) -> NoReturn:
    """A forked process: train, tell how it went, and wait to be killed.

    Taking gloo apart while peers go hung now and then (seen with torch 2.13), and an early exit breaks what the others
    still do.
    """
    try:
        train(rank, found, store)
        os.write(done, b"0")
    except BaseException:  # outermost frame of the process
        traceback.print_exc()
        os.write(done, b"1")
    while True:
        signal.pause()


def main() -> None:
    """Fork the processes, which share the imports, and end them when all have trained or one has failed."""
    found = parse()
    if found.parent:
        end_with_parent(found.parent)
    store = found.out.with_suffix(".store")
    import_once(found.system)
    me = os.getpid()
    answers, done = os.pipe()
    children = []
    for rank in range(WORLD):
        pid = os.fork()
        if pid == 0:
            end_with_parent(me)
            run_process(rank, found, store, done)
        children.append(pid)
    told = b""
    while len(told) < WORLD and b"1" not in told:
        told += os.read(answers, WORLD)
    for pid in children:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    sys.exit(1 if b"1" in told else 0)


if __name__ == "__main__":
    main()
