"""Jobs in which ranks leave, are lost or do not answer, and the store is lost."""

import os
import signal
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from pytest import raises
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from elaswave.comm.communicator import Communicator
from elaswave.comm.process_group import ElasticProcessGroup, forget_step
from elaswave.core.ids import WorkerId
from elaswave.errors import DeadlineExceeded, EpochChanged, LinkClosed, ProtocolError
from tests.comm.process_group_place import LIMIT_S, Place, die, die_after, job, joined
from tests.comm.process_group_training import batch_of, loss_of, model_of
from tests.held_end import held_end


@job
def leave_at_once(place: Place) -> object:
    """Rank 1 has what the barrier gives and is gone before rank 0, the root, tells ranks 2 and 3."""
    rank, size = place.rank, place.size
    store = dist.FileStore(str(place.folder / "left"), size)
    with joined(place) as group:
        dist.all_to_all_single(torch.empty(size), torch.ones(size))  # everybody has links with everybody
        communicator = group._group.communicator
        transmit = communicator._transmit

        def late(member: WorkerId, found: Communicator, number: int, tensor: Tensor) -> None:
            if member == 2:
                store.wait(["left"], timedelta(seconds=LIMIT_S))
            transmit(member, found, number, tensor)

        if rank == 0:
            communicator._transmit = late
        dist.barrier()
    if rank == 1:
        store.set("left", "1")
    return True


@job
def take_what_was_sent(place: Place) -> object:
    """Ranks send a message and are gone before rank 0 takes it; what was not sent is not waited for."""
    rank, size = place.rank, place.size
    store = dist.FileStore(str(place.folder / "left"), size)
    with joined(place) as group:
        if rank:
            dist.send(torch.full((3,), float(rank)), 0)
        else:
            store.wait([f"left{other}" for other in range(1, size)], timedelta(seconds=LIMIT_S))
            last = torch.empty(3)
            dist.recv(last, size - 1)
            assert last[0] == size - 1
            assert {dist.recv(torch.empty(3)) for _ in range(size - 2)} == set(range(1, size - 1))
            with raises(EpochChanged):
                dist.recv(torch.empty(3), 1)
            group.reconfigure()
            assert dist.get_world_size() == 1
    if rank:
        store.set(f"left{rank}", "1")
    return True


# ---------------------------------------------------------------------- ranks that do not answer


def stop() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def wait_until_stopped(pid: int) -> None:
    """Before, it would hear of what happens next."""
    deadline = time.monotonic() + LIMIT_S
    while ") T " not in Path(f"/proc/{pid}/stat").read_text():
        assert time.monotonic() < deadline, f"process {pid} is not stopped"
        os.sched_yield()


def fails_at(deadline_s: float, call: Callable[[], object]) -> str:
    """Message of the DeadlineExceeded that it raises at about that time."""
    start = time.monotonic()
    with raises(DeadlineExceeded) as caught:
        call()
    assert deadline_s * 0.9 < time.monotonic() - start < deadline_s + 2.0
    return str(caught.value)


def fails_with(kind: type[Exception], call: Callable[[], object]) -> Exception | None:
    """The error of this kind that it raises, if it does."""
    try:
        call()
    except kind as error:
        return error
    return None


@job
def differ_in_shape(place: Place) -> object:
    """The user's error is told to the user, and no rank is taken for lost because of it."""
    store = dist.FileStore(str(place.folder / "failed"), place.size)
    with joined(place, 1.0) as group:
        dist.barrier()
        # in memory all find it; over links rank 0, the root, gets too much of rank 1, and the others wait for rank 0
        with raises((ProtocolError, DeadlineExceeded)) as caught:
            dist.all_reduce(torch.ones(4 if place.rank == 1 else 3))
        assert group.epoch == 0
        store.set(f"failed{place.rank}", "1")
        store.wait([f"failed{rank}" for rank in range(place.size)], timedelta(seconds=LIMIT_S))
        return str(caught.value)


@job
def lose_a_rank_before_a_new_group(place: Place) -> object:
    store = dist.FileStore(str(place.folder / "passed"), place.size)
    with joined(place) as group:
        dist.barrier()
        if place.rank == 3:
            # Not right behind the barrier: where it dies before any survivor has passed, that fails on all of them.
            store.wait([f"passed{rank}" for rank in range(3)], timedelta(seconds=LIMIT_S))
            die()
        store.set(f"passed{place.rank}", "1")
        start = time.monotonic()
        with raises(EpochChanged), group.guard():
            dist.new_group([0, 1, 2, 3])
        group.reconfigure()
        assert time.monotonic() - start < LIMIT_S / 2
        mine = dist.new_group([0, 1, 2])
        tensor = torch.full((3,), float(place.rank))
        dist.all_reduce(tensor, group=mine)
        assert tensor[0] == 3.0
        dist.barrier()
    return True


@job
def stopped(place: Place) -> object:
    """Rank 2 is stopped; the others learn its name within the timeout, and go on once it is killed."""
    rank, limit_s = place.rank, 1.0
    store = dist.FileStore(str(place.folder / "pids"), place.size)
    store.set(f"pid{rank}", str(os.getpid()))
    with joined(place, limit_s) as group:
        model = DistributedDataParallel(model_of(), bucket_cap_mb=0.1)
        dist.barrier()
        if rank == 2:
            stop()

        def step() -> None:
            with group.guard():
                loss_of(model, batch_of(rank, 0)).backward()

        calls: dict[str, Callable[[], object]] = {
            "all_reduce": lambda: dist.all_reduce(torch.ones(500_000)),
            "recv": lambda: dist.recv(torch.ones(3), 2),
            "ddp": step,
        }
        said = fails_at(limit_s, calls[place.arguments["call"]])
        if place.arguments["call"] != "recv":
            start = time.monotonic()
            with raises(DeadlineExceeded):
                dist.barrier()  # fails at once: members may be at different operations
            assert time.monotonic() - start < 0.5
        store.set(f"failed{rank}", "1")
        if rank == 0:
            store.wait([f"failed{other}" for other in (0, 1, 3)], timedelta(seconds=LIMIT_S))
            os.kill(int(store.get("pid2")), signal.SIGKILL)
        if place.arguments["call"] == "recv":
            with raises(EpochChanged):
                dist.barrier()
        group.reconfigure()
        forget_step(model)
        step()
        expected = torch.stack([loss_of(model.module, batch_of(other, 0)) for other in (0, 1, 3)]).mean()
        gradients = torch.autograd.grad(expected, list(model.module.parameters()))
        for parameter, gradient in zip(model.module.parameters(), gradients, strict=True):
            torch.testing.assert_close(parameter.grad, gradient, rtol=1e-12, atol=1e-12)
        dist.barrier()
    return said


@job
def stopped_while_agreeing(place: Place) -> object:
    """Rank 1 is killed, and rank 3 stopped before it has heard of that: reconfigure ends within the timeout."""
    rank = place.rank
    store = dist.FileStore(str(place.folder / "pids"), place.size)
    store.set(f"pid{rank}", str(os.getpid()))
    with joined(place, 1.0) as group:
        dist.barrier()
        if rank == 3:
            stop()
        if rank == 1:
            wait_until_stopped(int(store.get("pid3")))
            die()
        with raises(EpochChanged):
            dist.recv(torch.ones(3), 1)
        said = fails_at(1.0, group.reconfigure)
        store.set(f"failed{rank}", "1")
        if rank == 0:
            store.wait(["failed0", "failed2"], timedelta(seconds=LIMIT_S))
            os.kill(int(store.get("pid3")), signal.SIGKILL)
        group.reconfigure()
        tensor = torch.full((50_000,), rank + 1.0)
        dist.all_reduce(tensor)
        assert tensor[-1] == 4.0 and dist.get_world_size() == 2
        dist.barrier()
    return said


@job
def killed_and_held(place: Place) -> object:
    """Rank 2 is killed, and does not come to the end of its end: the others go on meanwhile."""
    rank = place.rank
    store = dist.FileStore(str(place.folder / "pids"), place.size)
    store.set(f"pid{rank}", str(os.getpid()))
    with joined(place) as group:
        dist.barrier()
        if rank == 2:
            signal.pause()
        with held_end(int(store.get("pid2"))) if rank == 0 else nullcontext():
            start = time.monotonic()
            if rank == 0:
                os.kill(int(store.get("pid2")), signal.SIGKILL)
            with raises(EpochChanged):
                dist.all_reduce(torch.ones(500_000))
            assert time.monotonic() - start < LIMIT_S / 2, "noticed, and not only given up when its time was over"
            group.reconfigure()
            tensor = torch.full((50_000,), rank + 1.0)
            dist.all_reduce(tensor)
            assert tensor[-1] == 7.0 and dist.get_world_size() == 3
            dist.barrier()
    return True


def serve_store(folder: Path, size: int) -> None:
    """Become the process of a TCPStore."""
    store = dist.TCPStore("127.0.0.1", 0, size + 1, is_master=True, wait_for_workers=False)
    dist.FileStore(str(folder / "port"), size).set("port", f"{store.port} {os.getpid()}")
    signal.pause()


@job
def lose_the_store(place: Place) -> object:
    """The last rank is the store, and is killed; after that no loss can be agreed upon, and everybody learns that."""
    rank, size = place.rank, place.size - 1
    if rank == size:
        serve_store(place.folder, place.size)
    port, pid = (int(word) for word in dist.FileStore(str(place.folder / "port"), place.size).get("port").split())
    store = dist.TCPStore("127.0.0.1", port, size + 1, wait_for_workers=False)
    dist.init_process_group("elastic", store=store, rank=rank, world_size=size, timeout=timedelta(seconds=LIMIT_S))
    group = dist.group.WORLD
    assert isinstance(group, ElasticProcessGroup)
    model = DistributedDataParallel(model_of(), bucket_cap_mb=0.1)
    if rank == 0:
        os.kill(pid, signal.SIGKILL)
    dist.barrier()
    if rank == 1:
        die_after(group, 2)
    start = time.monotonic()
    with raises(LinkClosed, match="store"), group.guard():
        loss_of(model, batch_of(rank, 0)).backward()
    with raises(LinkClosed, match="store"):
        group.reconfigure()
    assert time.monotonic() - start < LIMIT_S / 2
    return True


@job
def killed_in_a_barrier(place: Place) -> object:
    """Rank 2 waits in memory for the others, one of which sees that there and kills it."""
    rank, size = place.rank, place.size
    store = dist.FileStore(str(place.folder / "pids"), size)
    store.set(f"pid{rank}", str(os.getpid()))
    with joined(place) as group:
        dist.all_reduce(torch.ones(place.arguments["length"]))
        sharing = group._group._sharing
        assert sharing._arenas is not None
        if rank == 0:
            entered, before = sharing._arenas._heads[2], sharing._arenas._heads[0][0]
            deadline = time.monotonic() + LIMIT_S
            while entered[0] <= before and time.monotonic() < deadline:
                os.sched_yield()
            os.kill(int(store.get("pid2")), signal.SIGKILL)
        tensor = torch.full((place.arguments["length"],), rank + 1.0)
        succeeded = fails_with(EpochChanged, lambda: dist.all_reduce(tensor)) is None
        assert not succeeded or torch.equal(tensor, torch.full_like(tensor, 10.0)), tensor
        if succeeded:  # rank 2 had given all that was wanted of it
            with raises(EpochChanged):
                dist.barrier()
        group.reconfigure()
        tensor.fill_(rank + 1.0)
        dist.all_reduce(tensor)
        assert torch.equal(tensor, torch.full_like(tensor, 7.0)), tensor
        dist.barrier()
    return succeeded


@job
def abort_from_threads(place: Place) -> object:
    """Ranks that wait for rank 3 give up: threads of theirs abort the group under them."""
    store = dist.FileStore(str(place.folder / "aborted"), place.size)
    others = [f"aborted{rank}" for rank in range(3)]
    with joined(place) as group:
        dist.all_reduce(torch.ones(50_000))
        mine = dist.new_group()
        assert isinstance(mine, ElasticProcessGroup)
        if place.rank == 3:
            store.wait(others, timedelta(seconds=LIMIT_S))
            return True
        work = dist.all_reduce(torch.ones(50_000), group=mine, async_op=True)
        assert work is not None
        start = time.monotonic()
        with ThreadPoolExecutor(4) as pool:
            aborted = [pool.submit(found.abort) for found in (mine, mine, group, group)]
            with raises(LinkClosed, match=r"destroyed|closed"):
                work.wait()
        for found in aborted:
            found.result()
        assert time.monotonic() - start < LIMIT_S / 2
        store.set(f"aborted{place.rank}", "1")
    return True
