"""TorchFT's side of benchmarks/rivals.py: one replica group of one process. Runs until it is stopped.

Timeouts are those of TorchFT's own example: 5 s for gloo, 30 s for the manager.
"""

import argparse
import time
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from rival_model import STEP_S, StepLog, batches, loss_of, make_layers, next_batch
from torch import nn
from torch._C._distributed_c10d import TCPStore
from torchft import (  # type: ignore[import-not-found,unused-ignore]
    DistributedDataParallel,
    Manager,
    Optimizer,
    ProcessGroupGloo,
)

from elaswave.lifeline import end_with_parent


class Replica:
    """The model, its state for newcomers, and the manager."""

    def __init__(self, replica: int, lighthouse: str) -> None:
        self.net = nn.Sequential(*make_layers())
        self.committed = False
        self._store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self.manager = Manager(
            pg=ProcessGroupGloo(timeout=timedelta(seconds=5)),
            min_replica_size=1,
            load_state_dict=self.load,
            state_dict=self.state,
            replica_id=f"replica_{replica}",
            lighthouse_addr=lighthouse,
            hostname="127.0.0.1",
            timeout=timedelta(seconds=30),
            store_addr="127.0.0.1",
            store_port=self._store.port,
            rank=0,
            world_size=1,
        )
        self.model = DistributedDataParallel(self.manager, self.net)
        self.optimizer = Optimizer(self.manager, torch.optim.AdamW(self.net.parameters(), lr=1e-3))

    def state(self) -> dict[str, Any]:
        """What a newcomer needs."""
        return {"model": self.net.state_dict(), "optimizer": self.optimizer.state_dict()}

    def load(self, state: Mapping[str, Any]) -> None:
        """Become like the replica that the state comes from."""
        self.net.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])


def main() -> None:
    """Train."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--replica", type=int, required=True)
    parser.add_argument("--lighthouse", required=True)
    parser.add_argument("--events", type=Path, required=True, help="folder for the log of steps")
    parser.add_argument("--parent", type=int, required=True, help="end with this process")
    found = parser.parse_args()
    end_with_parent(found.parent)
    torch.set_num_threads(1)
    log = StepLog(found.events / f"{found.replica}.jsonl")
    replica = Replica(found.replica, found.lighthouse)
    log.write("ready")
    source = batches(found.replica)
    while True:
        replica.optimizer.zero_grad()
        time.sleep(STEP_S)  # the emulated device
        loss_of(replica.model(next_batch(source))).backward()  # type: ignore[no-untyped-call]
        before = replica.manager.current_step()
        replica.optimizer.step()
        step = replica.manager.current_step()
        log.write("step", step=step - 1, committed=int(step > before), participants=replica.manager.num_participants())


if __name__ == "__main__":
    main()
