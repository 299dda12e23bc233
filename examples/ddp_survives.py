"""Plain DDP that loses a rank in the middle of a backward pass and goes on: python examples/ddp_survives.py"""

import os
import signal
import tempfile

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


def train(me: int, store: str) -> None:
    """One rank. `me` is its number at the start; dist.get_rank() changes with the losses."""
    dist.init_process_group("elastic", store=dist.FileStore(store, RANKS), rank=me, world_size=RANKS)
    group = dist.group.WORLD
    assert isinstance(group, ElasticProcessGroup)
    plain, batches = build()
    model, optimizer = DistributedDataParallel(plain, bucket_cap_mb=0.05), optim.SGD(plain.parameters(), lr=0.1)
    step = 0
    while step < STEPS:
        try:
            with group.guard():  # DDP makes a RuntimeError of EpochChanged: this gives it its name back
                if (me, step) == (VICTIM, FATAL_STEP):  # die when the last layers' gradients are on their way
                    next(plain.parameters()).register_hook(lambda _: os.kill(os.getpid(), signal.SIGKILL))
                loss = loss_of(model, batches[me])
                loss.backward()
        except EpochChanged:
            group.reconfigure()
            forget_step(model)
            continue  # the same step again, on whoever is left, with the parameters that it began with
        optimizer.step()
        optimizer.zero_grad()
        if dist.get_rank() == 0:
            print(f"step {step}: {dist.get_world_size()} ranks, loss of rank 0 {loss.item():.6f}", flush=True)
        step += 1
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":  # not by torchrun, which ends all workers when one dies
    with tempfile.TemporaryDirectory() as folder:
        context = torch.multiprocessing.get_context("fork")
        ranks = [context.Process(target=train, args=(rank, f"{folder}/store")) for rank in range(RANKS)]
        for process in ranks:
            process.start()
        for process in ranks:
            process.join()
    print(f"exit codes: {[process.exitcode for process in ranks]}")
