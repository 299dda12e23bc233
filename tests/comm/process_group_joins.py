"""Jobs that processes join while they run, and that are lost while others join."""

import os
import signal
import time
from collections.abc import Iterable
from datetime import timedelta

import torch
import torch.distributed as dist
from pytest import raises
from torch.nn.parallel import DistributedDataParallel

from elaswave.comm.fabric import SHARED_MEMORY_VARIABLE
from elaswave.comm.process_group import ElasticProcessGroup, forget_step, join
from elaswave.core.ids import WorkerId
from elaswave.errors import ConfigError, DeadlineExceeded, EpochChanged, FaultError
from tests.comm.process_group_place import LIMIT_S, Place, die, die_after, job
from tests.comm.process_group_training import agrees, batch_of, loss_of, model_of, oracle, sgd

LATEST_STEPS = 4
"""After which a rank dies wherever it is, if it has not come to the place where it should."""


def begin(place: Place, ranks: int) -> ElasticProcessGroup:
    """The first `ranks` processes make the default group, the others join it."""
    store = dist.FileStore(str(place.folder / "store"), place.size)
    limit = timedelta(seconds=LIMIT_S)
    if place.rank >= ranks:
        os.environ[SHARED_MEMORY_VARIABLE] = place.arguments.get(
            "memory_of_newcomers", os.environ[SHARED_MEMORY_VARIABLE]
        )
        return join(store=store, timeout=limit)
    dist.init_process_group("elastic", store=store, rank=place.rank, world_size=ranks, timeout=limit)
    group = dist.group.WORLD
    assert isinstance(group, ElasticProcessGroup)
    return group


class Training:
    """DDP whose history says which workers have taken part in each step."""

    def __init__(self, place: Place, group: ElasticProcessGroup) -> None:
        self.place = place
        self.group = group
        self.worker = group._fabric.me
        self.model = model_of(seed=int(self.worker))  # only what is shared is right
        self.optimizer = sgd(self.model)
        self.history: list[list[int]] = []
        self.losses = [loss for loss in place.arguments.get("losses", []) if loss[0] == place.rank]
        self.complete = False
        if not group._fabric.has_joined:
            self.model.load_state_dict(model_of().state_dict())
            self.parallel = DistributedDataParallel(self.model, bucket_cap_mb=0.1)

    def share(self, source: int) -> None:
        self.at("share")
        state = [self.model.state_dict(), self.optimizer.state_dict(), self.history]
        dist.broadcast_object_list(state, source)
        self.model.load_state_dict(state[0])
        self.optimizer.load_state_dict(state[1])
        self.history = state[2]
        self.parallel = DistributedDataParallel(self.model, bucket_cap_mb=0.1)

    def step(self) -> None:
        """One step, whoever comes or goes."""
        with self.group.guard():
            self.at("admit")
            self.group.admit(self.share)
            # Now: a step may succeed whose loss of a member is known at its end.
            members = sorted(self.group._group.communicator.members)
            complete = torch.tensor([int(self.is_complete())])
            self.at("step")
            loss_of(self.parallel, batch_of(self.worker, len(self.history))).backward()
            dist.all_reduce(complete, dist.ReduceOp.MIN)
            self.complete = bool(complete[0])
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.history.append(members)

    def is_complete(self) -> bool:
        """Whether all have come that will come, and gone that will go."""
        roster, wanted = self.group._fabric._roster, self.place.arguments
        joined, lost = self.place.size - wanted["ranks"], len(wanted.get("losses", []))
        return (len(roster.added), len(roster.removed)) == (joined, lost)

    def run(self, steps: int) -> None:
        """At least so many steps, and until all is over."""
        deadline = time.monotonic() + LIMIT_S
        while len(self.history) < steps or not self.complete:
            assert time.monotonic() < deadline, self.group._fabric._roster
            try:
                self.step()
            except EpochChanged:
                self.group.reconfigure()
                if hasattr(self, "parallel"):
                    forget_step(self.parallel)

    def at(self, where: str) -> None:
        """Die here where that is wanted, some lines of collectives later."""
        for loss in self.losses:
            _, step, place, lines = loss
            if (place == where and len(self.history) >= step) or len(self.history) >= step + LATEST_STEPS:
                self.losses = []
                die_after(self.group, lines)


@job
def train_and_join(place: Place) -> object:
    """Ranks join, others are killed; all that are left have the weights that the history of members asks for."""
    group = begin(place, place.arguments["ranks"])
    training = Training(place, group)
    training.run(6)
    wanted = place.size - len(place.arguments.get("losses", []))
    agrees(training.model.state_dict(), oracle(training.history))
    assert training.history[-1] == sorted(group._group.communicator.members)
    assert dist.get_process_group_ranks(group) == list(range(wanted))
    made = dist.new_group(list(range(wanted)))
    tensor = torch.ones(1000)
    dist.all_reduce(tensor, group=made)
    assert tensor[-1] == wanted
    dist.barrier()
    assert place.arguments.get("memory_of_newcomers") != "0" or group._group._sharing._arenas is None
    dist.destroy_process_group()
    return training.history


@job
def groups_before_and_after(place: Place) -> object:
    """Groups that were made before somebody joins work on, and those made after it are for all."""
    ranks = place.arguments["ranks"]
    group = begin(place, ranks)
    shared: list[int] = []
    if place.rank < ranks:
        pair = dist.new_group([0, 1])
        if isinstance(pair, ElasticProcessGroup):
            with raises(ConfigError, match="cannot grow"):
                pair.admit(shared.append)
        while dist.get_world_size() < place.size:
            group.admit(shared.append)
            if place.rank < 2:
                tensor = torch.ones(70_000)
                dist.all_reduce(tensor, group=pair)
                assert tensor[-1] == 2
    while not shared:
        group.admit(shared.append)
    assert shared == [0]
    everybody = dist.new_group()
    some = dist.new_group([0, place.size - 1])
    for length in (10, 70_000):
        tensor = torch.full((length,), place.rank + 1.0)
        dist.all_reduce(tensor, group=everybody)
        assert tensor[-1] == sum(range(place.size + 1))
        if dist.get_rank() in (0, place.size - 1):
            tensor = torch.ones(length)
            dist.all_reduce(tensor, group=some)
            assert tensor[-1] == 2
    dist.barrier()
    dist.destroy_process_group()
    return dist.is_initialized()


@job
def all_with_the_state_are_lost(place: Place) -> object:
    """Rank 0 alone has it, and dies when it is to share it."""
    group = begin(place, 1)
    if place.rank == 0:
        deadline = time.monotonic() + LIMIT_S
        while len(group._fabric.applicants()) < place.size - 1:
            assert time.monotonic() < deadline
        group.admit(lambda _: die())
    said = ""
    while not said:
        try:
            group.admit(lambda source: dist.broadcast(torch.ones(3), source))
        except EpochChanged:
            group.reconfigure()
        except FaultError as error:
            said = f"{type(error).__name__}: {error}"
    dist.destroy_process_group()
    return said


@job
def applicants_that_die(place: Place) -> object:
    """The last two processes wait to join; the last one is killed before it is let in, and must not be waited for."""
    store = dist.FileStore(str(place.folder / "store"), place.size)
    store.set(f"pid{place.rank}", str(os.getpid()))
    if place.rank == place.size - 1:
        store.wait([f"applied{place.rank - 1}"], timedelta(seconds=LIMIT_S))
    if place.rank == place.size - 2:
        store.set(f"applied{place.rank}", "1")
    group = begin(place, place.size - 2)
    limit = timedelta(seconds=LIMIT_S)
    shared: list[int] = []
    if place.rank == 0:
        deadline = time.monotonic() + LIMIT_S
        while len(group._fabric.applicants()) < 2:
            assert time.monotonic() < deadline
        os.kill(int(store.get(f"pid{place.size - 1}")), signal.SIGKILL)
        store.set("killed", "1")
    if place.rank < place.size - 2:
        store.wait(["killed"], limit)
    over = torch.tensor([0])
    while not over:
        try:
            group.admit(shared.append)
            over[0] = int(len(group._fabric._roster.removed) == 1)
            dist.all_reduce(over, dist.ReduceOp.MIN)
        except EpochChanged:
            over.zero_()
            group.reconfigure()
    tensor = torch.ones(70_000)
    dist.all_reduce(tensor)
    assert shared and tensor[-1] == place.size - 1
    dist.barrier()
    dist.destroy_process_group()
    return True


@job
def apply_in_vain(place: Place) -> object:
    """Nobody admits the second process in time; later it is not let in."""
    store = dist.FileStore(str(place.folder / "store"), place.size)
    if place.rank:
        with raises(DeadlineExceeded, match="admit"):
            join(store=store, timeout=timedelta(seconds=0.5))
        store.set("gave up", "1")
        store.wait(["looked"], timedelta(seconds=LIMIT_S))
        return dist.is_initialized()
    limit = timedelta(seconds=LIMIT_S)
    dist.init_process_group("elastic", store=store, rank=0, world_size=1, timeout=limit)
    store.wait(["gave up"], limit)
    group = dist.group.WORLD
    assert isinstance(group, ElasticProcessGroup)
    assert group.admit(lambda _: None) is False
    assert group._fabric._roster.epoch == 0, "nor was it let in and lost"
    store.set("looked", "1")
    return dist.get_world_size()


@job
def loss_while_others_join(place: Place) -> object:
    """Rank 2 dies when all are agreed that a process is to join; rank 0 hears of that first. Whether `admit` raised."""
    group = begin(place, place.size - 1)
    fabric = group._fabric
    if place.rank == 0:
        deadline, let_in = time.monotonic() + LIMIT_S, fabric.add
        while not fabric.applicants():
            assert time.monotonic() < deadline

        def add_later(workers: Iterable[WorkerId]) -> None:
            fabric.endpoint.drive(lambda: fabric.broken, deadline, "news of the loss")
            let_in(workers)

        fabric.add = add_later  # type: ignore[method-assign]
    if place.rank == 2:
        fabric.await_change = die  # type: ignore[method-assign]
    raised, shared = 0, list[int]()
    while not shared:
        try:
            with group.guard():
                group.admit(shared.append)
        except EpochChanged:
            group.reconfigure()
            raised += 1
    dist.barrier()
    dist.destroy_process_group()
    return raised > 0
