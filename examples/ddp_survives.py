"""Plain DDP that loses a rank in the middle of a backward pass and goes on: python examples/ddp_survives.py"""

import os
import signal
import tempfile

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from elaswave.comm.process_group import run_step

RANKS, STEPS, VICTIM, FATAL_STEP = 4, 6, 2, 3


def train(me: int, store: str) -> None:
    dist.init_process_group("elastic", store=dist.FileStore(store, RANKS), rank=me, world_size=RANKS)
    torch.manual_seed(0)
    plain, batch = nn.Sequential(nn.Linear(64, 256), nn.Tanh(), nn.Linear(256, 64)), torch.randn(RANKS, 8, 64)[me]
    model, optimizer = DistributedDataParallel(plain, bucket_cap_mb=0.05), torch.optim.SGD(plain.parameters(), lr=0.1)

    def forward_backward() -> Tensor:
        (loss := (model(batch) - batch.flip(-1)).square().mean()).backward()
        return loss

    for step in range(STEPS):
        if (me, step) == (VICTIM, FATAL_STEP):  # die when the last layers' gradients are on their way
            plain[0].weight.register_hook(lambda _: os.kill(os.getpid(), signal.SIGKILL))
        loss = run_step(forward_backward, model)  # the same step again, on whoever is left
        optimizer.step(), optimizer.zero_grad()
        if dist.get_rank() == 0:
            print(f"step {step}: {dist.get_world_size()} ranks, loss of rank 0 {loss.item():.6f}", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":  # not by torchrun, which ends all workers when one dies
    with tempfile.TemporaryDirectory() as folder:
        ranks = torch.multiprocessing.start_processes(
            train, (f"{folder}/store",), RANKS, join=False, start_method="fork"
        )
        print(f"exit codes: {[process.join() or process.exitcode for process in ranks.processes]}")
