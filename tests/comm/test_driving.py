"""Several threads of one process on one endpoint: one drives, the others learn of what they wait for."""

import os
import time
from concurrent.futures import Future
from datetime import timedelta
from pathlib import Path

import pytest
import torch

from elaswave.comm.endpoint import Endpoint
from elaswave.comm.works import OperationWork, ReceiveWork
from elaswave.errors import DeadlineExceeded
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
