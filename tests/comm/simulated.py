"""Communicators of several ranks in one process: a walk decides what arrives when, who dies and who hears of it."""

import random
from collections import deque
from collections.abc import Callable

import torch
from torch import Tensor

from elaswave.comm.collectives.commands import Collective
from elaswave.comm.communicator import Communicator
from elaswave.comm.operation import Operation
from elaswave.core.ids import WorkerId

FAR = 1e9

Make = Callable[[int, int, Tensor], Collective]
"""(rank, size, tensor) -> the collective."""


class Network:
    """One communicator on each rank; a link between two of them keeps its order, all else is up to the walk."""

    def __init__(self, size: int, generator: random.Random) -> None:
        self.generator = generator
        self.links: dict[tuple[WorkerId, WorkerId], deque[tuple[int, int, Tensor]]] = {}
        members = [WorkerId(worker) for worker in range(size)]
        self.ranks = {worker: self._communicator(worker, members) for worker in members}
        self.alive = set(members)

    def _communicator(self, me: WorkerId, members: list[WorkerId]) -> Communicator:
        def transmit(to: WorkerId, communicator: Communicator, number: int, tensor: Tensor) -> None:
            content = tensor.clone().view(torch.uint8) if tensor.numel() else torch.empty(0, dtype=torch.uint8)
            if to in self.alive:
                self.links.setdefault((me, to), deque()).append((communicator.epoch, number, content))

        return Communicator("all", 1, me=me, members=members, transmit=transmit, agree_s=FAR)

    def start(
        self,
        worker: WorkerId,
        make: Make,
        tensor: Tensor,
        *,
        keep: bool,
        catch_up: Callable[[], None] | None = None,
    ) -> Operation:
        """Start a collective on one rank."""
        communicator = self.ranks[worker]
        collective = make(communicator.rank, communicator.size, tensor)
        operation = Operation("test", collective, FAR, tensor if keep else None, keep=keep)
        operation.catch_up = catch_up
        communicator.submit(operation)
        return operation

    def deliver_one(self) -> bool:
        """One frame of a random link arrives; False where none is under way."""
        ready = sorted(pair for pair, frames in self.links.items() if frames and pair[1] in self.alive)
        if not ready:
            return False
        sender, receiver = self.generator.choice(ready)
        epoch, number, content = self.links[sender, receiver].popleft()
        self.ranks[receiver].receive(sender, epoch, number, content.numpy())
        return True

    def kill(self, worker: WorkerId) -> None:
        """What it has sent and what is sent to it is lost from some point on."""
        self.alive.discard(worker)
        for pair, frames in self.links.items():
            if worker in pair:
                while frames and self.generator.random() < 0.5:
                    frames.pop()
        for pair in [pair for pair in self.links if pair[1] == worker]:
            del self.links[pair]

    def edit(self, worker: WorkerId, epoch: int, gone: list[WorkerId]) -> None:
        """A survivor hears of a loss."""
        self.ranks[worker].edit(epoch, gone, (), 0.0)

    def join(self, worker: WorkerId, members: list[WorkerId], epoch: int) -> None:
        """A new rank takes part from this epoch on."""
        self.ranks[worker] = self._communicator(worker, members)
        self.alive.add(worker)
        self.ranks[worker].join(epoch, 0.0)

    def run(self) -> None:
        """Deliver everything."""
        waiting = True
        while waiting:
            while self.deliver_one():
                pass
            waiting = any(self.look(worker) for worker in sorted(self.alive))

    def look(self, worker: WorkerId) -> bool:
        """Have a rank see what is in memory by now; whether it could go on."""
        awaited = self.ranks[worker].awaited_memory()
        if awaited is None or not awaited.is_ready():
            return False
        self.ranks[worker].look()
        return True
