"""Tensors as users have them: parameters, outputs that cannot be written, parts of the wrong length."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from elaswave.comm.group import Group
from elaswave.comm.operation import Operation
from elaswave.comm.operators import average_over
from elaswave.comm.works import OperationWork
from elaswave.errors import ConfigError
from tests.comm.test_endpoint import ARENAS, Gang, gang, sum_of_ones

Start = Callable[[Group, int, Tensor, list[Tensor]], Operation]
"""(group, rank, given, two outputs) -> what was started."""


def all_gather(group: Group, rank: int, given: Tensor, outputs: list[Tensor]) -> Operation:
    return group.all_gather(outputs, given)


def reduce(group: Group, rank: int, given: Tensor, outputs: list[Tensor]) -> Operation:
    return group.reduce(given, 1)


def scatter(group: Group, rank: int, given: Tensor, outputs: list[Tensor]) -> Operation:
    return group.scatter(outputs[0], [given, given] if rank == 0 else [], 0)


def gather(group: Group, rank: int, given: Tensor, outputs: list[Tensor]) -> Operation:
    return group.gather(outputs if rank == 0 else [], given, 0)


def all_to_all(group: Group, rank: int, given: Tensor, outputs: list[Tensor]) -> Operation:
    return group.all_to_all(outputs, [given, given])


def reduce_scatter(group: Group, rank: int, given: Tensor, outputs: list[Tensor]) -> Operation:
    return group.reduce_scatter(outputs[0], [given, given])


def broadcast(group: Group, rank: int, given: Tensor, outputs: list[Tensor]) -> Operation:
    return group.broadcast(given, 0)


def all_reduce(group: Group, rank: int, given: Tensor, outputs: list[Tensor]) -> Operation:
    return group.all_reduce(given, finish=average_over(dist.ReduceOp.AVG, given, 2))


@pytest.mark.parametrize(
    "start", [all_gather, reduce, scatter, gather, all_to_all, reduce_scatter, broadcast, all_reduce]
)
@pytest.mark.parametrize("length", [3, 300_000])
@pytest.mark.parametrize("arena_bytes", ARENAS)
def test_parameters_are_taken_and_written_whoever_drives(
    tmp_path: Path, start: Start, length: int, arena_bytes: int
) -> None:
    """Each rank's are its own; their gradients are recorded in the threads that drive."""
    with gang(tmp_path, 2) as ranks:
        groups = ranks.groups(arena_bytes=arena_bytes)

        def work(rank: int) -> list[float]:
            both = torch.ones(length, 2, requires_grad=True)
            given = both[:, rank] if start in (all_reduce, broadcast) else both.detach()[:, 0].clone().requires_grad_()
            outputs = [torch.zeros(length, 2)[:, 0].requires_grad_() for _ in range(2)]
            endpoint, operation = ranks.endpoints[rank], start(groups[rank], rank, given, outputs)
            OperationWork(endpoint, [operation], []).get_future().wait()  # another thread drives
            assert sum_of_ones(groups[rank]) == 2.0
            return [float(found.detach()[-1]) for found in (given, *outputs)]

        found = ranks.on_all(work)
        expected = {
            all_gather: [[1.0, 1.0, 1.0]] * 2,
            reduce: [[1.0, 0.0, 0.0], [2.0, 0.0, 0.0]],
            scatter: [[1.0, 1.0, 0.0]] * 2,
            gather: [[1.0, 1.0, 1.0], [1.0, 0.0, 0.0]],
            all_to_all: [[1.0, 1.0, 1.0]] * 2,
            reduce_scatter: [[1.0, 2.0, 0.0]] * 2,
            broadcast: [[1.0, 0.0, 0.0]] * 2,
            all_reduce: [[1.0, 0.0, 0.0]] * 2,
        }
        assert found == expected[start]


def refused(ranks: Gang, start: Callable[[int], Operation]) -> list[object]:
    def work(rank: int) -> str:
        with pytest.raises(ConfigError, match="cannot work on these tensors") as caught:
            ranks.endpoints[rank].wait(start(rank))
        return str(caught.value)

    return ranks.on_all(work)


def test_parts_of_the_wrong_length_fail_the_operation_and_nothing_else(tmp_path: Path) -> None:
    with gang(tmp_path, 2) as ranks:
        groups, others = ranks.groups(), ranks.groups("others")
        given, outputs = [torch.ones(2), torch.ones(2)], [torch.zeros(3), torch.zeros(3)]
        said = refused(ranks, lambda rank: groups[rank].all_to_all(outputs, given))
        assert all("all_to_all of all" in str(text) for text in said)
        with pytest.raises(ConfigError):
            ranks.endpoints[0].wait(groups[0].barrier())  # members may be at different operations
        assert ranks.on_all(lambda rank: sum_of_ones(others[rank])) == [2.0, 2.0]


def test_an_output_that_cannot_be_written_fails_the_operation_and_nothing_else(tmp_path: Path) -> None:
    with gang(tmp_path, 2) as ranks:
        groups = ranks.groups()
        said = refused(ranks, lambda rank: groups[rank].all_reduce(torch.ones(1).expand(5)))
        assert all("all_reduce of all" in str(text) for text in said)
        assert ranks.on_all(lambda rank: sum_of_ones(groups[rank])) == [2.0, 2.0]
