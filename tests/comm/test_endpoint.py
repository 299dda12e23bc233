"""Endpoints with real links: every rank a thread of this process, edits and failures at any moment."""

import gc
import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from elaswave.comm.communicator import Communicator
from elaswave.comm.endpoint import Endpoint
from elaswave.comm.group import Group
from elaswave.comm.inbox import PeerClosed
from elaswave.core.ids import WorkerId
from elaswave.errors import DeadlineExceeded, EpochChanged, LinkClosed, PeerError, ProtocolError

LIMIT_S = 30.0
ARENAS = [pytest.param(0, id="links"), pytest.param(1 << 18, id="memory")]


class Gang:
    """Endpoints 0..n-1 that know each other."""

    def __init__(self, folder: Path, size: int) -> None:
        self.closed: list[PeerClosed] = []
        self.endpoints = [
            Endpoint(WorkerId(rank), b"token", on_lost=self.closed.append, on_notice=lambda peer, content: None)
            for rank in range(size)
        ]
        addresses = {
            WorkerId(rank): endpoint.open(f"unix:{folder / str(rank)}") for rank, endpoint in enumerate(self.endpoints)
        }
        for endpoint in self.endpoints:
            endpoint.connect(addresses)
        self.members = [WorkerId(rank) for rank in range(size)]
        self.pool = ThreadPoolExecutor(size)

    def groups(self, name: str = "all", timeout_s: float = LIMIT_S, arena_bytes: int = 0) -> list[Group]:
        return [
            Group(found, found.communicator(name, self.members), timeout_s, arena_bytes=arena_bytes)
            for found in self.endpoints
        ]

    def on_all(self, work: Callable[[int], object], ranks: range | None = None) -> list[object]:
        """Run it on every rank at once; raises what the first one raises."""
        running = [self.pool.submit(work, rank) for rank in ranks or range(len(self.endpoints))]
        return [found.result(2 * LIMIT_S) for found in running]


@contextmanager
def gang(folder: Path, size: int) -> Iterator[Gang]:
    made = Gang(folder, size)
    try:
        yield made
    finally:
        for endpoint in made.endpoints:
            endpoint.close(0.5)
        made.pool.shutdown()


def sum_of_ones(group: Group, length: int = 5) -> float:
    tensor = torch.ones(length)
    group.endpoint.wait(group.all_reduce(tensor))
    assert torch.equal(tensor, tensor[:1].expand(length))
    return float(tensor[0])


@pytest.mark.parametrize("length", [5, 100_000])
@pytest.mark.parametrize("arena_bytes", ARENAS)
def test_all_ranks_get_the_sum(tmp_path: Path, length: int, arena_bytes: int) -> None:
    with gang(tmp_path, 4) as ranks:
        groups = ranks.groups(arena_bytes=arena_bytes)
        assert ranks.on_all(lambda rank: [sum_of_ones(groups[rank], length) for _ in range(5)]) == [[4.0] * 5] * 4


@pytest.mark.parametrize("arena_bytes", ARENAS)
def test_operations_of_two_communicators_do_not_wait_for_each_other(tmp_path: Path, arena_bytes: int) -> None:
    with gang(tmp_path, 2) as ranks:
        first = ranks.groups("first", arena_bytes=arena_bytes)
        second = ranks.groups("second", arena_bytes=arena_bytes)

        def work(rank: int) -> float:
            order = (first, second) if rank else (second, first)
            started = [found[rank].all_reduce(torch.ones(100_000)) for found in order]
            for operation in reversed(started):
                order[0][rank].endpoint.wait(operation)
            return sum_of_ones(first[rank])

        assert ranks.on_all(work) == [2.0, 2.0]


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def take_up(endpoint: Endpoint, communicator: Communicator) -> None:
    endpoint.await_agreement(communicator, time.monotonic() + LIMIT_S)
    endpoint.acknowledge(communicator)


def mappings() -> int:
    return Path("/proc/self/maps").read_text().count("elaswave-arena")


@pytest.mark.parametrize("arena_bytes", ARENAS)
def test_a_thousand_edits_leave_nothing_behind(tmp_path: Path, arena_bytes: int) -> None:
    with gang(tmp_path, 3) as ranks:
        groups = ranks.groups(arena_bytes=arena_bytes)
        joining = WorkerId(2)

        def edit(rank: int, epoch: int, *, add: bool) -> None:
            endpoint, communicator = groups[rank].endpoint, groups[rank].communicator
            endpoint.edit(communicator, epoch, () if add else (joining,), (joining,) if add else ())
            take_up(endpoint, communicator)

        def work(rank: int, epochs: range) -> None:
            for epoch in epochs:
                if rank < 2:
                    edit(rank, epoch, add=epoch % 2 == 0)
                elif epoch % 2 == 0:
                    endpoint = groups[2].endpoint
                    endpoint.drop(groups[2].communicator)
                    groups[2].close()
                    communicator = endpoint.communicator("all", ranks.members, epoch=epoch)
                    groups[2] = Group(endpoint, communicator, LIMIT_S, arena_bytes=arena_bytes)
                    take_up(endpoint, communicator)
                if rank < 2 or epoch % 2 == 0:
                    assert sum_of_ones(groups[rank]) == (3.0 if epoch % 2 == 0 else 2.0)

        ranks.on_all(lambda rank: work(rank, range(1, 11)))
        gc.collect()  # what is no longer used has gone now
        before = descriptors(), threading.active_count(), mappings()
        dials = [endpoint.statistics().dials for endpoint in ranks.endpoints]
        ranks.on_all(lambda rank: work(rank, range(11, 1011)))
        gc.collect()
        assert (descriptors(), threading.active_count(), mappings()) == before
        assert [endpoint.statistics().dials for endpoint in ranks.endpoints] == dials, "an edit made links anew"
        assert ranks.closed == []


@pytest.mark.parametrize("settled", [True, False])
@pytest.mark.parametrize("arena_bytes", ARENAS)
def test_a_storm_of_edits_from_several_threads_ends_every_operation(
    tmp_path: Path, arena_bytes: int, settled: bool
) -> None:
    with gang(tmp_path, 4) as ranks:
        groups = ranks.groups(arena_bytes=arena_bytes)
        edits = 40

        def storm(communicator: Communicator, endpoint: Endpoint, first: int) -> None:
            for epoch in range(first, edits, 3):
                endpoint.edit(communicator, epoch, ())

        def work(rank: int) -> int:
            endpoint, communicator = groups[rank].endpoint, groups[rank].communicator
            threads = [threading.Thread(target=storm, args=(communicator, endpoint, first)) for first in (1, 2, 3)]
            for thread in threads:
                thread.start()
            changed = 0
            while communicator.epoch < edits - 1 or communicator.broken:
                try:
                    assert sum_of_ones(groups[rank]) == 4.0
                except EpochChanged:
                    changed += 1
                    if settled:
                        endpoint.await_agreement(communicator, time.monotonic() + LIMIT_S)
                    endpoint.acknowledge(communicator)
            for thread in threads:
                thread.join()
            return changed

        assert all(isinstance(changed, int) and changed > 0 for changed in ranks.on_all(work))
        assert ranks.on_all(lambda rank: sum_of_ones(groups[rank])) == [4.0] * 4


def test_a_silent_rank_is_named_when_the_deadline_has_come(tmp_path: Path) -> None:
    with gang(tmp_path, 2) as ranks:
        groups = ranks.groups(timeout_s=0.3)
        started = time.monotonic()
        with pytest.raises(
            DeadlineExceeded, match=r"all_reduce of all: its timeout ended while it waited for rank 1 \(worker 1\)"
        ):
            sum_of_ones(groups[0])
        assert time.monotonic() - started < 5.0


def test_who_is_removed_is_told_so(tmp_path: Path) -> None:
    with gang(tmp_path, 2) as ranks:
        groups = ranks.groups()
        operation = groups[1].all_reduce(torch.ones(3))
        groups[1].endpoint.edit(groups[1].communicator, 1, (WorkerId(1),))
        with pytest.raises(EpochChanged):
            groups[1].endpoint.wait(operation)
        with pytest.raises(EpochChanged, match="was removed from all in epoch 1"):
            take_up(groups[1].endpoint, groups[1].communicator)


@pytest.mark.parametrize("arena_bytes", ARENAS)
def test_closing_ends_a_wait_of_another_thread(tmp_path: Path, arena_bytes: int) -> None:
    with gang(tmp_path, 2) as ranks:
        groups = ranks.groups(arena_bytes=arena_bytes)
        waiting = ranks.pool.submit(sum_of_ones, groups[0])
        ranks.endpoints[0].close(5.0)
        with pytest.raises(LinkClosed, match="closed"):
            waiting.result(LIMIT_S)


def is_asleep(endpoint: Endpoint) -> bool:
    """Some thread waits for messages, or for memory."""
    return endpoint._inbox._asleep


def asleep_in_an_all_reduce(ranks: Gang, group: Group) -> Future[None]:
    """A thread that waits for an all-reduce which nobody else has started."""
    waiting = ranks.pool.submit(group.endpoint.wait, group.all_reduce(torch.ones(5)))
    while not is_asleep(group.endpoint):
        os.sched_yield()
    return waiting


@pytest.mark.parametrize("arena_bytes", ARENAS)
def test_dropping_a_communicator_ends_a_wait_of_another_thread(tmp_path: Path, arena_bytes: int) -> None:
    with gang(tmp_path, 2) as ranks:
        groups = ranks.groups(arena_bytes=arena_bytes)
        ranks.on_all(lambda rank: sum_of_ones(groups[rank]))
        waiting = asleep_in_an_all_reduce(ranks, groups[0])
        groups[0].endpoint.drop(groups[0].communicator)
        with pytest.raises(LinkClosed, match="the group all was destroyed"):
            waiting.result(LIMIT_S)


@pytest.mark.parametrize("arena_bytes", ARENAS)
def test_an_edit_that_leaves_one_rank_ends_a_wait_of_another_thread(tmp_path: Path, arena_bytes: int) -> None:
    with gang(tmp_path, 2) as ranks:
        groups = ranks.groups(arena_bytes=arena_bytes)
        ranks.on_all(lambda rank: sum_of_ones(groups[rank]))
        waiting = asleep_in_an_all_reduce(ranks, groups[0])
        groups[0].endpoint.edit(groups[0].communicator, 1, (WorkerId(1),))
        with pytest.raises(EpochChanged):
            waiting.result(LIMIT_S / 2)


@pytest.mark.parametrize("meta", [b"", b"12345678", b"x" * 19])
def test_a_malformed_frame_closes_the_link_with_an_error_that_says_so(tmp_path: Path, meta: bytes) -> None:
    with gang(tmp_path, 2) as ranks:
        groups = ranks.groups()
        identity = groups[0].communicator.identity.to_bytes(8, "little")
        ranks.endpoints[1]._links.send(WorkerId(0), 1, identity + meta)
        endpoint = ranks.endpoints[0]
        endpoint.drive(lambda: bool(ranks.closed), time.monotonic() + LIMIT_S, "the report")
        assert isinstance(ranks.closed[0].error, ProtocolError) and "malformed" in ranks.closed[0].reason


def test_a_lost_peer_is_reported_to_who_waits(tmp_path: Path) -> None:
    with gang(tmp_path, 2) as ranks:
        groups = ranks.groups()
        ranks.on_all(lambda rank: sum_of_ones(groups[rank]))
        operation = groups[0].all_reduce(torch.ones(3))
        ranks.endpoints[1].close(5.0)
        endpoint = ranks.endpoints[0]
        endpoint.drive(lambda: bool(ranks.closed), time.monotonic() + LIMIT_S, "the report")
        assert isinstance(ranks.closed[0].error, PeerError)
        endpoint.edit(groups[0].communicator, 1, (WorkerId(1),))
        with pytest.raises(EpochChanged):
            endpoint.wait(operation)
        take_up(endpoint, groups[0].communicator)
        assert sum_of_ones(groups[0]) == 1.0


@pytest.mark.parametrize("length", [1, 3, 7_000, 50_000, 90_000])
def test_collectives_of_all_sizes_give_what_all_ranks_have_given(tmp_path: Path, length: int) -> None:
    """Sizes on both sides of each limit in group.py; parts of different lengths, next to each other and apart."""
    size = 6
    lengths = [length + rank for rank in range(size)]
    with gang(tmp_path, size) as made:
        groups = made.groups()

        def work(rank: int) -> None:
            group, wait = groups[rank], made.endpoints[rank].wait
            tensor = torch.full((size * length,), rank + 1.0)
            wait(group.all_reduce(tensor))
            assert bool((tensor == 21).all())
            inputs = [torch.full((count,), float(rank + place)) for place, count in enumerate(lengths)]
            output = torch.empty(lengths[rank])
            wait(group.reduce_scatter(output, inputs))
            assert bool((output == 15 + size * rank).all())
            assert all(bool((given == rank + place).all()) for place, given in enumerate(inputs))
            whole = torch.full((sum(lengths),), -1.0)
            for outputs in (list(whole.split(lengths)), [torch.full((count,), -1.0) for count in lengths]):
                wait(group.all_gather(outputs, torch.full((lengths[rank],), rank + 0.5)))
                assert all(bool((found == place + 0.5).all()) for place, found in enumerate(outputs))

        made.on_all(work)


def test_last_words_of_destroyed_groups_do_not_keep_out_what_a_new_group_needs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("elaswave.comm.endpoint.LATE_STORE_LIMIT", 8)
    with gang(tmp_path, 2) as ranks:
        first, second = ranks.endpoints
        there = [second.communicator(f"old {index}", ranks.members) for index in range(20)]
        for communicator in there:
            second.send(communicator, 0, 0, torch.ones(1))
        new = second.communicator("new", ranks.members)
        second.send(new, 0, 0, torch.full((1,), 5.0))
        mark = second.communicator("mark", ranks.members)
        second.send(mark, 0, 0, torch.ones(1))
        found = torch.zeros(1)
        for name in ("mark", "new"):
            communicator = first.communicator(name, ranks.members)
            first.receive(communicator, first.expect(communicator, 1, 0), found, time.monotonic() + LIMIT_S)
        assert found.item() == 5.0
