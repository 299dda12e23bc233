"""torchrun's side of benchmarks/rivals.py: DDP on gloo that goes on from a checkpoint. Runs until it is stopped."""

import argparse
import os
import time
from pathlib import Path

import torch
import torch.distributed as dist
from rival_model import STEP_S, StepLog, batches, loss_of, make_layers, next_batch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from elaswave.lifeline import end_with_parent


def main() -> None:
    """Train."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--events", type=Path, required=True, help="folder for the log of steps, and the checkpoint")
    parser.add_argument("--checkpoint-every", type=int, required=True)
    found = parser.parse_args()
    end_with_parent(os.getppid())
    rank = int(os.environ["RANK"])
    log = StepLog(found.events / f"{rank}.jsonl")
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    net = nn.Sequential(*make_layers())
    model = DistributedDataParallel(net)
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3)
    path = found.events / "checkpoint.pt"
    step = 0
    if path.exists():
        state = torch.load(path, weights_only=True)
        net.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        step = state["step"]
    log.write("ready", step=step)
    source = batches(rank)
    while True:
        optimizer.zero_grad()
        time.sleep(STEP_S)  # the emulated device
        loss_of(model(next_batch(source))).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        log.write("step", step=step)
        step += 1
        if rank == 0 and step % found.checkpoint_every == 0:
            temporary = path.with_suffix(".new")
            torch.save({"model": net.state_dict(), "optimizer": optimizer.state_dict(), "step": step}, temporary)
            temporary.replace(path)


if __name__ == "__main__":
    main()
