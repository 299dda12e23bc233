"""Admission of processes to a lone torch job that runs, at a place in the program that all its ranks come to."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from elaswave.comm.collectives.reduction import maximum
from elaswave.comm.fabric import Fabric
from elaswave.comm.group import Group
from elaswave.core.ids import WorkerId
from elaswave.errors import EpochChanged, FaultError


@dataclass(frozen=True, slots=True, kw_only=True)
class Survey:
    """The same on all ranks. wanted: processes wait to join. lacking: some rank has no state yet.

    source: the first rank that has it; the number of ranks where none has.
    """

    wanted: bool
    lacking: bool
    source: int


class Newcomer:
    """Whether this rank still lacks the state of the others."""

    def __init__(self, *, lacks_state: bool) -> None:
        self.lacks_state = lacks_state

    def survey(self, group: Group, wanted: bool) -> Survey:
        """Tell the others, and hear of them. Raises EpochChanged after a loss."""
        rank, size = group.communicator.rank, group.communicator.size
        offered = 0 if self.lacks_state else size - rank
        words = torch.tensor([int(wanted), int(self.lacks_state), offered])
        group.endpoint.wait(group.all_reduce(words, maximum))
        some_wanted, some_lack, most_offered = words.tolist()
        return Survey(wanted=bool(some_wanted), lacking=bool(some_lack), source=size - most_offered)

    def receive(self, group: Group, share: Callable[[int], object], source: int) -> None:
        """Share the state of a rank; this one has it when all ranks say so. Raises EpochChanged, and what `share` does.

        FaultError: no rank is left that has it.
        """
        if source == group.communicator.size:
            raise FaultError("all ranks that had the state of the job were lost before they had shared it")
        share(source)
        group.endpoint.wait(group.barrier())
        self.lacks_state = False


def take_in(fabric: Fabric, applicants: Sequence[WorkerId], losses: int) -> int:
    """Have them join, who are given on the first rank only, and take up the groups with them; the epoch of that.

    losses: how many were known before the ranks agreed on this. Raises EpochChanged where there are more: other ranks
    may hear of a loss apart from the admission, and raise it.
    """
    if applicants:
        fabric.add(applicants)
    fabric.await_change()
    epoch = fabric.reconfigure()
    if fabric.losses > losses:
        raise EpochChanged("a member was lost while others joined: call reconfigure() and repeat the step")
    return epoch
