"""Jobs with groups of some of the ranks, of which others are lost."""

from collections.abc import Iterator
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from elaswave.comm.collectives.tree import parent_of
from elaswave.comm.communicator import AGREEMENT, Communicator
from elaswave.comm.process_group import ElasticProcessGroup
from elaswave.errors import EpochChanged
from tests.comm.process_group_jobs import same
from tests.comm.process_group_place import LIMIT_S, Place, die, job, joined
from tests.comm.process_group_training import members

ROWS = [[0, 4, 2], [3, 1, 5]]
COLUMNS = [[0, 3], [4, 1], [2, 5]]
STEPS = 4


class GridStep:
    """Sums in the own row, in the own column and in all, each of other numbers in each step; a rank dies before one."""

    def __init__(self, place: Place, world: ElasticProcessGroup) -> None:
        self.place = place
        self.world = world
        self.row, self.column = self._made(ROWS), self._made(COLUMNS)
        self.present: list[int] = []
        """The members of the last step that has succeeded here."""
        self.losses = [(step, before) for worker, step, before in place.arguments["losses"] if worker == place.rank]

    def _made(self, lines: list[list[int]]) -> ElasticProcessGroup:
        own = [made for ranks in lines if isinstance(made := dist.new_group(ranks), ElasticProcessGroup)]
        assert len(own) == 1
        return own[0]

    def _operations(self, step: int) -> Iterator[ElasticProcessGroup]:
        yield from (self.row, self.column) if step % 2 else (self.column, self.row)
        yield self.world

    def run(self, step: int) -> None:
        for index, group in enumerate(self._operations(step)):
            if (step, index) in self.losses:
                die()
            mine = torch.full((10,), self._number(self.place.rank, step, index))
            present = members(group)  # now: a loss may be known when the sum has succeeded
            dist.all_reduce(mine, group=group)
            same(mine, torch.full((10,), sum(self._number(worker, step, index) for worker in present)))
        self.present = present

    @staticmethod
    def _number(worker: int, step: int, index: int) -> float:
        return float((worker + 1) * (4 * step + index + 1))


@job
def sums_in_a_grid(place: Place) -> object:
    """ "losses" are [worker, step, before which of its sums]; "untold": a rank that hears of no first agreement."""
    history: list[list[int]] = []
    with joined(place) as world:
        work = GridStep(place, world)
        dist.barrier()
        untold = place.arguments.get("untold")
        if untold is not None and world.rank() == parent_of(untold):
            die_before_telling(world._group.communicator, untold)
        while len(history) < STEPS:
            try:
                with world.guard():
                    work.run(len(history))
                history.append(work.present)
            except EpochChanged:
                world.reconfigure()
    return history


def die_before_telling(communicator: Communicator, untold: int) -> None:
    """SIGKILL this process when it should tell a rank what all have agreed on."""
    transmit = communicator._transmit

    def watched(member: int, found: Communicator, number: int, tensor: Tensor) -> None:
        if number == AGREEMENT and member == untold:
            die()
        transmit(member, found, number, tensor)

    communicator._transmit = watched


@job
def groups_in_a_step(place: Place) -> object:
    """Each step makes its groups; in one a rank dies when some have made, or tried to make, more than others."""
    limit = timedelta(seconds=LIMIT_S)
    sums: list[float] = []
    with joined(place, LIMIT_S) as world:
        dist.barrier()
        while len(sums) < STEPS:
            size = dist.get_world_size()
            if (place.rank, len(sums)) == (place.size - 1, 1):
                die()
            try:
                with world.guard():
                    halves = [list(range(size // 2)), list(range(size // 2, size))]
                    if size == place.size:
                        halves[0].append(halves[1].pop())  # who dies is missed by the first group
                    made = [dist.new_group(ranks, timeout=limit) for ranks in halves]
                    local = dist.new_group(halves[0], timeout=limit, use_local_synchronization=True)
                    everyone = dist.new_group(timeout=limit)
                    for group in (*made, local, everyone):
                        if isinstance(group, ElasticProcessGroup):
                            ones, wanted = torch.ones(3), float(group.size())
                            dist.all_reduce(ones, group=group)
                            same(ones, torch.full((3,), wanted))
                    for group in (everyone, *made):
                        if isinstance(group, ElasticProcessGroup):
                            dist.destroy_process_group(group)
                    dist.barrier()
                sums.append(size)
            except EpochChanged:
                world.reconfigure()
        other = dist.new_group(backend="gloo", timeout=limit)  # goes by the names of groups
        ones = torch.ones(3)
        dist.all_reduce(ones, group=other)
        same(ones, torch.full((3,), float(dist.get_world_size())))
    return sums
