"""Several threads of one process on one endpoint: one drives, the others learn of what they wait for."""

import os
import time
from concurrent.futures import Future
from datetime import timedelta
from pathlib import Path

import pytest
import torch

from elaswave.comm.endpoint import Endpoint
from elaswave.comm.operation import Operation
from elaswave.comm.works import OperationWork, ReceiveWork
from elaswave.core.ids import WorkerId
from elaswave.errors import DeadlineExceeded, LinkClosed
from tests.comm.test_endpoint import ARENAS, LIMIT_S, Gang, gang, is_asleep, sum_of_ones


def until_asleep(endpoint: Endpoint) -> None:
    """Until a thread drives, and has nothing more to do."""
    while not is_asleep(endpoint):
        os.sched_yield()


def until_waiting(endpoint: Endpoint) -> None:
    """Until a thread waits for the one that drives."""
    while not endpoint._changed._waiters:  # type: ignore[attr-defined]
        os.sched_yield()


def receiving(ranks: Gang, work: ReceiveWork, tensor: torch.Tensor) -> Future[float]:
    def receive() -> float:
        work.wait()
        return float(tensor)

    return ranks.pool.submit(receive)


def test_a_message_ends_a_wait_while_another_thread_drives(tmp_path: Path) -> None:
    with gang(tmp_path, 2) as ranks:
        groups = ranks.groups()
        ranks.on_all(lambda rank: sum_of_ones(groups[rank]))
        operation = groups[0].all_reduce(torch.ones(5))  # rank 1 begins it when its message was taken
        endpoint = ranks.endpoints[0]
        endpoint.attend()
        until_asleep(endpoint)
        tensor = torch.zeros(())
        taken = receiving(ranks, ReceiveWork(groups[0], 1, 0, tensor), tensor)
        until_waiting(endpoint)
        groups[1].endpoint.send(groups[1].communicator, 0, 0, torch.ones(1))
        assert taken.result(LIMIT_S / 2) == 1.0
        assert sum_of_ones(groups[1]) == 2.0
        endpoint.wait(operation)


def test_a_message_to_oneself_ends_the_wait_of_another_thread(tmp_path: Path) -> None:
    with gang(tmp_path, 1) as ranks:
        (group,) = ranks.groups()
        tensor = torch.zeros(())
        taken = receiving(ranks, ReceiveWork(group, 0, 0, tensor), tensor)
        until_asleep(group.endpoint)
        group.endpoint.send(group.communicator, 0, 0, torch.ones(1))
        assert taken.result(LIMIT_S / 2) == 1.0


SHORT = timedelta(seconds=0.3)


@pytest.mark.parametrize("arena_bytes", ARENAS)
@pytest.mark.parametrize("before", [0, 1])
def test_a_timeout_of_a_wait_holds_while_another_thread_drives(tmp_path: Path, arena_bytes: int, before: int) -> None:
    """Also where what is waited for has not begun, because an operation before it hangs."""
    with gang(tmp_path, 2) as ranks:
        groups = ranks.groups(arena_bytes=arena_bytes)
        ranks.on_all(lambda rank: sum_of_ones(groups[rank]))
        endpoint = ranks.endpoints[0]
        *_, operation = [groups[0].all_reduce(torch.ones(5)) for _ in range(before + 1)]
        endpoint.attend()
        until_asleep(endpoint)
        began = time.monotonic()
        with pytest.raises(DeadlineExceeded, match=r"rank 1 \(worker 1\)"):
            OperationWork(endpoint, [operation], []).wait(SHORT)
        assert time.monotonic() - began < LIMIT_S / 2


def test_the_timeout_of_a_group_holds_while_another_thread_drives(tmp_path: Path) -> None:
    with gang(tmp_path, 2) as ranks:
        patient, hasty = ranks.groups("patient"), ranks.groups("hasty", SHORT.total_seconds())
        endpoint = ranks.endpoints[0]
        patient[0].all_reduce(torch.ones(5))
        endpoint.attend()
        until_asleep(endpoint)
        began = time.monotonic()
        with pytest.raises(DeadlineExceeded, match=r"rank 1 \(worker 1\)"):
            sum_of_ones(hasty[0])
        assert time.monotonic() - began < LIMIT_S / 2


@pytest.mark.parametrize("arena_bytes", ARENAS)
def test_a_callback_waits_for_operations_of_its_own(tmp_path: Path, arena_bytes: int) -> None:
    """As DDP's PowerSGD hook does: the thread that calls it is the one that drives."""
    with gang(tmp_path, 2) as ranks:
        groups = ranks.groups(arena_bytes=arena_bytes)

        def work(rank: int) -> list[float]:
            group, endpoint = groups[rank], ranks.endpoints[rank]

            def started() -> OperationWork:
                tensor = torch.ones(5)
                return OperationWork(endpoint, [group.all_reduce(tensor)], [tensor])

            def again(ended: torch.futures.Future[list[torch.Tensor]]) -> float:
                waited, polled, last = started(), started(), started()
                waited.wait()
                while not polled.is_completed():
                    os.sched_yield()
                return sum(float(found[0]) for found in (*ended.value(), *last.get_future().wait()))

            futures = [started().get_future().then(again) for _ in range(3)]
            return [future.wait() for future in futures]

        assert ranks.on_all(work) == [[4.0] * 3] * 2


def test_a_callback_closes_the_endpoint(tmp_path: Path) -> None:
    with gang(tmp_path, 2) as ranks:
        groups = ranks.groups()
        endpoint = ranks.endpoints[0]
        operation = groups[0].all_reduce(torch.ones(5))
        endpoint.when_ended(operation, lambda _: endpoint.close(0.5))
        ended = ranks.pool.submit(endpoint.wait, operation)
        groups[1].all_reduce(torch.ones(5))
        with pytest.raises(LinkClosed, match="is closed"):
            ended.result(LIMIT_S / 2)
            endpoint.drive(lambda: False, time.monotonic() + LIMIT_S, "nothing")


def test_closing_ends_futures_that_nobody_waits_for(tmp_path: Path) -> None:
    with gang(tmp_path, 2) as ranks:
        groups = ranks.groups()
        ended: Future[Operation] = Future()
        ranks.endpoints[0].when_ended(groups[0].all_reduce(torch.ones(5)), ended.set_result)
        ranks.endpoints[0].close(0.5)
        with pytest.raises(LinkClosed, match="is closed"):
            ended.result(LIMIT_S / 2).raise_error()


def test_dropping_a_communicator_ends_a_receive_of_another_thread_and_what_is_begun_later(tmp_path: Path) -> None:
    with gang(tmp_path, 2) as ranks:
        group, other = ranks.groups()[0], ranks.groups("other")
        tensor = torch.zeros(())
        work = ReceiveWork(group, 1, 0, tensor)
        taken = receiving(ranks, work, tensor)
        until_asleep(group.endpoint)
        group.endpoint.drop(group.communicator)
        with pytest.raises(LinkClosed, match="the group all was destroyed"):
            taken.result(LIMIT_S / 2)
        calls = (
            lambda: group.endpoint.wait(group.all_reduce(torch.ones(5))),
            lambda: group.endpoint.send(group.communicator, 1, 0, torch.ones(1)),
            lambda: ReceiveWork(group, 1, 0, tensor),
            work.wait,
        )
        for call in calls:
            with pytest.raises(LinkClosed, match="the group all was destroyed"):
                call()
        group.endpoint.edit(group.communicator, 1, (WorkerId(1),))
        assert group.communicator.epoch == 0
        assert ranks.on_all(lambda rank: sum_of_ones(other[rank])) == [2.0, 2.0]
