"""The process group's own part: what it refuses, what torch is told of ranks, and what errors are called."""

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from elaswave.comm.fabric import Fabric
from elaswave.comm.group import Group
from elaswave.comm.inbox import PeerClosed
from elaswave.comm.process_group import ElasticProcessGroup, _update_tables
from elaswave.core.ids import WorkerId
from elaswave.errors import ConfigError, EpochChanged, LinkClosed

MEMBERS = tuple(WorkerId(rank) for rank in range(3))
LIMIT_S = 30.0


class Gang:
    """Two process groups on each of three ranks, all in this process."""

    def __init__(self, pool: ThreadPoolExecutor) -> None:
        self.pool = pool
        store = dist.HashStore()  # type: ignore[attr-defined]
        limit = timedelta(seconds=LIMIT_S)
        self.fabrics = list(pool.map(lambda worker: Fabric(store, worker, len(MEMBERS), limit), MEMBERS))
        self.worlds = [self._group(fabric, "world") for fabric in self.fabrics]
        self.others = [self._group(fabric, "other") for fabric in self.fabrics]

    def _group(self, fabric: Fabric, name: str) -> ElasticProcessGroup:
        group = Group(fabric.endpoint, fabric.communicator(name, MEMBERS), LIMIT_S)
        return ElasticProcessGroup(group, fabric, name)

    def on_all(self, work: Callable[[ElasticProcessGroup], dist.Work]) -> list[bool]:
        return list(self.pool.map(lambda group: work(group).wait(), self.worlds))


def hear_of_a_loss(fabric: Fabric) -> None:
    fabric.endpoint.drive(lambda: fabric.broken, time.monotonic() + LIMIT_S, "news of the loss")
    fabric.reconfigure()


@pytest.fixture
def gang() -> Iterator[Gang]:
    with ThreadPoolExecutor(len(MEMBERS)) as pool:
        made = Gang(pool)
        try:
            yield made
        finally:
            list(pool.map(Fabric.close, made.fabrics))


@pytest.mark.parametrize("elements", [1, 2, 4])
def test_what_cannot_be_divided_among_ranks_is_refused_before_anything_is_sent(gang: Gang, elements: int) -> None:
    for group in gang.worlds:
        calls = (group._allgather_base, group.all_gather_single_coalesced)
        for call, one in zip(calls, (lambda found: found, lambda found: [found]), strict=True):
            with pytest.raises(ConfigError, match=f"{elements} elements cannot be divided among 3 ranks"):
                call(one(torch.empty(elements)), one(torch.empty(1)))
        with pytest.raises(ConfigError, match=f"{elements} elements cannot be divided among 3 ranks"):
            group._reduce_scatter_base(torch.empty(1), torch.empty(elements))
    assert gang.on_all(ElasticProcessGroup.barrier) == [True] * 3


def test_coalesced_operations_take_tensors_without_elements(gang: Gang) -> None:
    def gather(group: ElasticProcessGroup) -> dist.Work:
        outputs, inputs = [torch.empty(0), torch.zeros(3)], [torch.empty(0), torch.ones(1)]
        return group.allgather_into_tensor_coalesced(outputs, inputs)

    def scatter(group: ElasticProcessGroup) -> dist.Work:
        outputs, inputs = [torch.empty(0), torch.zeros(1)], [torch.empty(0), torch.ones(3)]
        return group.reduce_scatter_tensor_coalesced(outputs, inputs)

    assert gang.on_all(gather) == [True] * 3
    assert gang.on_all(scatter) == [True] * 3


def test_tensors_made_for_the_ranks_of_before_a_loss_are_no_error_of_the_program(gang: Gang) -> None:
    world, fabric = gang.worlds[0], gang.fabrics[0]
    given = torch.ones(world.size())
    fabric._peer_lost(PeerClosed(peer=MEMBERS[2], error=LinkClosed("worker 2 hung up")))
    with pytest.raises(EpochChanged) as caught, world.guard():
        world.alltoall_base(torch.empty(3), given, [], [])
    assert isinstance(caught.value.__cause__, ConfigError)
    hearing = gang.pool.submit(hear_of_a_loss, gang.fabrics[1])
    fabric.reconfigure()
    hearing.result(LIMIT_S)
    with pytest.raises(ConfigError), world.guard():
        world.alltoall_base(torch.empty(3), given, [], [])


def test_torch_is_told_of_ranks_while_a_loss_is_becoming_known(gang: Gang, monkeypatch: pytest.MonkeyPatch) -> None:
    """The groups of a process are edited one after the other, by a thread that need not be the one that asks."""
    world, other = gang.worlds[0], gang.others[0]
    gang.fabrics[0].endpoint.edit(world._group.communicator, 1, [MEMBERS[1]])
    ranks: dict[object, dict[int, int]] = {}
    known = SimpleNamespace(group_count=0, default_pg=world, pg_map={world: None, other: None}, pg_group_ranks=ranks)
    monkeypatch.setattr(dist.distributed_c10d, "_world", known)
    _update_tables(1)
    assert ranks == {world: {0: 0, 1: 1}, other: {0: 0, 1: 2}}
