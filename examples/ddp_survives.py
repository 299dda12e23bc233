"""Plain DDP that loses a rank in the middle of a backward pass and goes on: python examples/ddp_survives.py

The step of the loss is repeated by the three survivors with the parameters that it began with. At the end these are
compared with those of an undisturbed run on one process. torchrun would end all workers when one dies; here they are
started by torch.multiprocessing, with a store in a file.
"""

import os
import signal
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn, optim
from torch.nn.parallel import DistributedDataParallel

from elaswave.comm.process_group import ElasticProcessGroup, forget_step
from elaswave.errors import EpochChanged

RANKS, STEPS, VICTIM, FATAL_STEP = 4, 6, 2, 3


def build() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 256), nn.Tanh(), nn.Linear(256, 64)), torch.randn(RANKS, 8, 64)


def loss_of(model: nn.Module, batch: Tensor) -> Tensor:
    return (model(batch) - batch.flip(-1)).square().mean()


def die(gradient: Tensor) -> None:
    del gradient
    os.kill(os.getpid(), signal.SIGKILL)


def train(me: int, store: str) -> None:
    """One rank. `me` is its number at the start; dist.get_rank() changes with the losses."""
    torch.set_num_threads(1)
    dist.init_process_group("elastic", store=dist.FileStore(store, RANKS), rank=me, world_size=RANKS)
    group = dist.group.WORLD
    assert isinstance(group, ElasticProcessGroup)
    plain, batches = build()
    model = DistributedDataParallel(plain, bucket_cap_mb=0.05)
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    step = 0
    while step < STEPS:
        try:
            with group.guard():  # DDP makes a RuntimeError of EpochChanged: this gives it its name back
                if (me, step) == (VICTIM, FATAL_STEP):
                    next(plain.parameters()).register_hook(die)  # when the last layers' gradients are on their way
                loss = loss_of(model, batches[me])
                loss.backward()
        except EpochChanged:
            group.reconfigure()
            forget_step(model)
            continue  # the same step again
        optimizer.step()
        optimizer.zero_grad()
        if dist.get_rank() == 0:
            print(f"step {step}: {dist.get_world_size()} ranks, loss of rank 0 {loss.item():.6f}", flush=True)
        step += 1
    if dist.get_rank() == 0:
        compare(plain)
    dist.barrier()
    dist.destroy_process_group()


def compare(found: nn.Module) -> None:
    """With one process that computes the mean over whoever was there in each step."""
    model, batches = build()
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    for step in range(STEPS):
        there = [rank for rank in range(RANKS) if rank != VICTIM or step < FATAL_STEP]
        optimizer.zero_grad()
        torch.stack([loss_of(model, batches[rank]) for rank in there]).mean().backward()
        optimizer.step()
    torch.testing.assert_close(found.state_dict(), model.state_dict())
    print("the parameters are those of an undisturbed run", flush=True)


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        # fork: torch is imported once. It must not be done after a TCPStore server was made here.
        context = torch.multiprocessing.get_context("fork")
        ranks = [context.Process(target=train, args=(rank, str(Path(folder) / "store"))) for rank in range(RANKS)]
        for process in ranks:
            process.start()
        for process in ranks:
            process.join()
    codes = [process.exitcode for process in ranks]
    print(f"exit codes: {codes}")
    assert codes == [-signal.SIGKILL if rank == VICTIM else 0 for rank in range(RANKS)]


if __name__ == "__main__":
    main()
