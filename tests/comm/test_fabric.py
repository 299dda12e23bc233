"""Fabrics with real links and a store: every rank a thread of this process; who tells whom of a loss."""

import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from datetime import timedelta
from itertools import count
from pathlib import Path
from typing import TypeVar

import pytest
import torch
import torch.distributed as dist

from elaswave.comm.communicator import Communicator
from elaswave.comm.endpoint import NOTICE
from elaswave.comm.fabric import RETIRED_LIMIT, Fabric
from elaswave.comm.group import Group
from elaswave.comm.inbox import PeerClosed
from elaswave.comm.roster import FIRST
from elaswave.comm.works import ReceiveWork
from elaswave.core.ids import WorkerId
from elaswave.errors import DeadlineExceeded, EpochChanged, LinkClosed

MEMBERS = tuple(WorkerId(rank) for rank in range(6))
LIMIT_S = 30.0

Result = TypeVar("Result")


class Gang:
    """A fabric of each worker, with a group of all of them that was used once."""

    def __init__(self, pool: ThreadPoolExecutor) -> None:
        self._pool = pool
        self.store = dist.HashStore()  # type: ignore[attr-defined]
        limit = timedelta(seconds=LIMIT_S)
        self.fabrics = self.on(MEMBERS, lambda worker: Fabric(self.store, worker, len(MEMBERS), limit))
        self._groups = {
            worker: Group(fabric.endpoint, fabric.communicator("all", MEMBERS), LIMIT_S)
            for worker, fabric in self.fabrics.items()
        }
        self.on(MEMBERS, self.sum_of_ones)

    def on(self, workers: Sequence[WorkerId], work: Callable[[WorkerId], Result]) -> dict[WorkerId, Result]:
        """Run it on these at once."""
        running = {worker: self._pool.submit(work, worker) for worker in workers}
        return {worker: found.result(2 * LIMIT_S) for worker, found in running.items()}

    def start(self, work: Callable[[], Result]) -> "Future[Result]":
        """Run it beside what follows."""
        return self._pool.submit(work)

    def sum_of_ones(self, worker: WorkerId) -> float:
        tensor = torch.ones(5)
        group = self._groups[worker]
        group.endpoint.wait(group.all_reduce(tensor))
        return float(tensor[0])

    def lose(self, worker: WorkerId, lost: WorkerId) -> None:
        """Have a worker notice that another one is gone."""
        self.fabrics[worker]._peer_lost(PeerClosed(peer=lost, error=LinkClosed(f"worker {lost} hung up")))

    def notices(self) -> int:
        sent = [row for fabric in self.fabrics.values() for row in fabric.endpoint.statistics().sent]
        return sum(row.frames for row in sent if row.kind == NOTICE)

    def agree(self, worker: WorkerId) -> None:
        """Hear of the first loss, and agree with the group of all."""
        found, endpoint = self._groups[worker].communicator, self.fabrics[worker].endpoint
        endpoint.drive(lambda: found.epoch == 1 and found.agreed, time.monotonic() + LIMIT_S, "the agreement")

    def recover(self, worker: WorkerId) -> float:
        """Hear of a loss, go on without the lost ones, and add up."""
        fabric = self.fabrics[worker]
        fabric.endpoint.drive(lambda: fabric.broken, time.monotonic() + LIMIT_S, "news of the loss")
        fabric.reconfigure()
        return self.sum_of_ones(worker)


@pytest.mark.parametrize("call", ["all_reduce", "all_reduce in memory", "reduce", "recv", "recv of any"])
def test_a_rank_that_ends_before_anything_was_sent_is_missed(call: str) -> None:
    """Of those that wait for it nobody has a link with it."""
    lost, limit = MEMBERS[-1], timedelta(seconds=LIMIT_S)
    store = dist.HashStore()  # type: ignore[attr-defined]
    with ThreadPoolExecutor(len(MEMBERS)) as pool:
        fabrics = list(pool.map(lambda worker: Fabric(store, worker, len(MEMBERS), limit), MEMBERS))
        arena_bytes = 1 << 18 if call == "all_reduce in memory" else 0

        def begin(worker: WorkerId) -> None:
            fabric = fabrics[worker]
            group = Group(fabric.endpoint, fabric.communicator("all", MEMBERS), LIMIT_S, arena_bytes=arena_bytes)
            if worker == lost:
                return
            began = time.monotonic()
            with pytest.raises(EpochChanged):
                if call.startswith("recv"):
                    ReceiveWork(group, None if call == "recv of any" else lost, 0, torch.empty(5)).wait()
                elif call == "reduce":
                    fabric.endpoint.wait(group.reduce(torch.ones(5), 0))
                else:
                    fabric.endpoint.wait(group.all_reduce(torch.ones(5)))
            fabric.reconfigure()
            assert group.communicator.members == MEMBERS[:-1]
            assert time.monotonic() - began < LIMIT_S / 2

        try:
            fabrics[lost].endpoint._links.close(0.0)
            for found in [pool.submit(begin, worker) for worker in MEMBERS]:
                found.result(2 * LIMIT_S)
        finally:
            list(pool.map(Fabric.close, fabrics))


@pytest.fixture
def gang() -> Iterator[Gang]:
    with ThreadPoolExecutor(len(MEMBERS)) as pool:
        made = Gang(pool)
        try:
            yield made
        finally:
            made.on(MEMBERS, lambda worker: made.fabrics[worker].close())


def test_of_all_who_notice_a_loss_one_tells_the_others(gang: Gang) -> None:
    lost, *left = MEMBERS
    for worker in left[:-1]:
        gang.lose(worker, lost)
    assert gang.notices() == len(left) - 1
    assert gang.on(left, gang.recover) == dict.fromkeys(left, float(len(left)))


def test_a_loss_is_known_to_all_although_its_teller_is_lost_before_it_has_told(
    gang: Gang, monkeypatch: pytest.MonkeyPatch
) -> None:
    lost, teller, *left = MEMBERS
    with monkeypatch.context() as patch:
        patch.setattr(gang.fabrics[teller].endpoint, "notify", lambda peer, content: None)
        gang.lose(teller, lost)
    gang.lose(left[0], lost)
    assert gang.notices() == 0
    gang.lose(left[1], teller)
    assert gang.on(left, gang.recover) == dict.fromkeys(left, float(len(left)))


def test_a_rendezvous_that_fails_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    threads, descriptors = threading.active_count(), len(os.listdir("/proc/self/fd"))
    with pytest.raises(RuntimeError):
        Fabric(dist.HashStore(), 0, 2, timedelta(milliseconds=20))  # type: ignore[attr-defined]
    assert threading.active_count() == threads
    assert len(os.listdir("/proc/self/fd")) == descriptors
    assert not list(tmp_path.iterdir())


def test_a_roster_of_unknown_workers_takes_its_sender_for_broken(gang: Gang) -> None:
    liar, *left = MEMBERS
    roster = FIRST.without([WorkerId(77)], liar)
    gang.fabrics[liar].endpoint.notify(left[0], roster.encode().encode())
    assert gang.on(left, gang.recover) == dict.fromkeys(left, float(len(left)))


def test_a_group_of_a_name_that_was_used_before_gets_nothing_meant_for_that(gang: Gang) -> None:
    """As torch names groups of the same ranks that are made one after the other."""
    pair = MEMBERS[:2]
    limit = timedelta(seconds=LIMIT_S)

    def made(worker: WorkerId) -> Group:
        fabric = gang.fabrics[worker]
        return Group(fabric.endpoint, fabric.gather(pair, limit), LIMIT_S)

    def sum_of(group: Group, value: float) -> float:
        tensor = torch.full((5,), value)
        group.endpoint.wait(group.all_reduce(tensor))
        return float(tensor[0])

    before = gang.on(pair, made)
    assert gang.on(pair, lambda worker: sum_of(before[worker], 1.0)) == dict.fromkeys(pair, 2.0)
    ahead, behind = pair[1], pair[0]
    gang.fabrics[ahead].drop(before[ahead].communicator)
    first = gang.start(lambda: sum_of(made(ahead), 10.0))  # and is here before the other has let go of the old one
    with suppress(DeadlineExceeded):
        gang.fabrics[behind].endpoint.drive(lambda: False, time.monotonic() + 0.2, "what should not come yet")
    gang.fabrics[behind].drop(before[behind].communicator)
    assert sum_of(made(behind), 10.0) == 20.0
    assert first.result(LIMIT_S) == 20.0


@pytest.mark.parametrize("known", [False, True])
def test_a_group_that_a_loss_has_kept_from_being_made_is_made_again_under_its_name(gang: Gang, known: bool) -> None:
    """Whether the loss is known when it is tried, and though others have not tried."""
    *left, lost = MEMBERS
    limit = timedelta(seconds=LIMIT_S)

    def attempt(worker: WorkerId) -> Communicator:
        return gang.fabrics[worker].gather(range(3), limit)

    if known:
        gang.lose(left[0], lost)
    waiting = gang.start(lambda: attempt(left[0]))
    if not known:
        gang.store.wait(["elaswave/group/workers 0,1,2/0"], limit)
        gang.lose(left[0], lost)
    with pytest.raises(EpochChanged):
        waiting.result(LIMIT_S)
    gang.on(left, gang.recover)
    found = gang.on(left[:3], attempt)
    assert all(communicator.members == tuple(left[:3]) for communicator in found.values())


def test_groups_with_operations_under_way_are_waited_for_and_no_others(
    gang: Gang, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was begun before the loss may yet succeed, and would write to a tensor that the repeated step has filled."""
    three, left, lost = MEMBERS[:3], MEMBERS[:-1], MEMBERS[-1]
    idle, late, busy = three
    some = gang.on(
        three,
        lambda worker: Group(gang.fabrics[worker].endpoint, gang.fabrics[worker].communicator("some", three), LIMIT_S),
    )
    edit, held = gang.fabrics[late].endpoint.edit, list[tuple[Communicator, int, Iterable[WorkerId]]]()

    def edit_later(communicator: Communicator, epoch: int, removed: Iterable[WorkerId], _: object) -> None:
        if communicator is some[late].communicator:
            held.append((communicator, epoch, removed))
        else:
            edit(communicator, epoch, removed)

    monkeypatch.setattr(gang.fabrics[late].endpoint, "edit", edit_later)
    operation = some[busy].all_reduce(torch.ones(3))
    gang.lose(idle, lost)
    gang.on(left, gang.agree)
    assert gang.fabrics[idle]._take_up() == 1
    assert gang.fabrics[busy]._take_up() is None
    assert not operation.finished
    edit(*held[0])
    gang.on(three, lambda worker: gang.fabrics[worker].reconfigure())
    assert operation.finished
    assert isinstance(operation.error, EpochChanged)


def test_who_has_destroyed_a_group_still_tells_what_has_succeeded_in_it(
    gang: Gang, monkeypatch: pytest.MonkeyPatch
) -> None:
    three = MEMBERS[:3]
    behind = three[-1]
    some = gang.on(
        three,
        lambda worker: Group(gang.fabrics[worker].endpoint, gang.fabrics[worker].communicator("some", three), LIMIT_S),
    )
    receive, lost_frames = some[behind].communicator.receive, list[int]()

    def receive_later(peer: WorkerId, epoch: int, number: int, payload: torch.Tensor) -> None:
        if epoch:
            receive(peer, epoch, number, payload)
        else:
            lost_frames.append(number)

    monkeypatch.setattr(some[behind].communicator, "receive", receive_later)
    total = torch.ones(3)
    operation = some[behind].all_reduce(total)

    def add_and_destroy(worker: WorkerId) -> None:
        some[worker].endpoint.wait(some[worker].all_reduce(torch.ones(3)))
        gang.fabrics[worker].drop(some[worker].communicator)

    gang.on(three[:-1], add_and_destroy)
    gang.lose(three[0], MEMBERS[-1])
    gang.on(MEMBERS[:-1], gang.recover)
    some[behind].endpoint.wait(operation)
    assert total.tolist() == [3.0] * 3
    with pytest.raises(LinkClosed, match="was destroyed"):
        some[three[0]].endpoint.wait(some[three[0]].all_reduce(torch.ones(3)))


def test_destroyed_groups_are_forgotten_when_all_are_past_them(gang: Gang) -> None:
    pair = MEMBERS[:2]
    names = {worker: map("pair {}".format, count()) for worker in pair}

    def make_and_destroy(worker: WorkerId) -> None:
        for _ in range(20):
            gang.fabrics[worker].drop(gang.fabrics[worker].communicator(next(names[worker]), pair))

    for _ in range(3):
        gang.on(pair, make_and_destroy)
        gang.on(MEMBERS, gang.sum_of_ones)
    gang.on(pair, make_and_destroy)
    for worker in pair:
        assert len(gang.fabrics[worker]._retired) == 20
    for _ in range(5):
        gang.on(pair, make_and_destroy)
    for worker in pair:
        assert len(gang.fabrics[worker]._retired) == RETIRED_LIMIT


def test_a_group_with_a_rank_that_has_left_is_not_waited_for(gang: Gang) -> None:
    *left, gone = MEMBERS
    gang.fabrics[gone].close()

    def attempt(worker: WorkerId) -> None:
        with pytest.raises(EpochChanged):
            gang.fabrics[worker].gather(range(len(MEMBERS)), timedelta(seconds=LIMIT_S))

    began = time.monotonic()
    gang.on(left, attempt)
    assert time.monotonic() - began < LIMIT_S / 2
    assert gang.on(left, gang.recover) == dict.fromkeys(left, float(len(left)))


def test_a_group_with_a_rank_that_ends_before_anybody_has_met_it(tmp_path: Path) -> None:
    store, limit = dist.HashStore(), timedelta(seconds=LIMIT_S)  # type: ignore[attr-defined]
    *left, gone = MEMBERS[:3]
    with ThreadPoolExecutor(3) as pool:
        fabrics = list(pool.map(lambda worker: Fabric(store, worker, 3, limit), (*left, gone)))
        worlds = [fabric.world("world") for fabric in fabrics]
        try:
            fabrics[gone].endpoint._links.close(0.0)
            for found in [pool.submit(fabrics[worker].gather, range(3), limit) for worker in left]:
                with pytest.raises(EpochChanged):
                    found.result(LIMIT_S / 2)
            list(pool.map(lambda worker: fabrics[worker].reconfigure(), left))
            assert all(worlds[worker].members == tuple(left) for worker in left)
        finally:
            list(pool.map(Fabric.close, fabrics))


def test_after_a_member_of_a_new_group_has_not_come_its_loss_is_waited_for(gang: Gang) -> None:
    """Ranks are at different steps then: what one repeats must not meet what another has not come to yet."""
    waiting, stuck, *others = MEMBERS
    left = [waiting, *others]
    for _ in range(2):
        with pytest.raises(DeadlineExceeded, match=r"ranks \[1\] of a new group of workers 0,1 have not come in time"):
            gang.fabrics[waiting].gather([0, 1], timedelta(seconds=0.2))
    with pytest.raises(DeadlineExceeded, match="new group"):
        gang.sum_of_ones(waiting)
    assert gang.fabrics[waiting]._take_up() is None
    gang.lose(others[0], stuck)
    assert gang.on(left, gang.recover) == dict.fromkeys(left, float(len(left)))
