"""Several threads of one process on one endpoint: one drives, the others learn of what they wait for."""

import os
from concurrent.futures import Future
from pathlib import Path

import torch

from elaswave.comm.endpoint import Endpoint
from elaswave.comm.works import ReceiveWork
from tests.comm.test_endpoint import LIMIT_S, Gang, gang, is_asleep, sum_of_ones


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
