"""Agreement: what the members of a new epoch find out about the operations of the one before, and what they hand over.

Both go along the tree of the new epoch, whose links are made or kept for the operations that follow.
"""

from collections.abc import Generator, Mapping
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from elaswave.comm.collectives.commands import Collective, Command, Receive, Send
from elaswave.comm.collectives.tree import children_of, parent_of

_WORDS: Final = 6


@dataclass(frozen=True, slots=True, kw_only=True)
class Standing:
    """How far operations have come on a rank, or on all of some ranks.

    completed: number of the last operation whose result any of them has handed out, `holder` has it and keeps
    `kept_bytes` of it. reachable: the least, over them, of the last number whose result a rank holds; `behind` of them
    hold no more. stake: the greatest.
    """

    completed: int
    holder: int
    kept_bytes: int
    reachable: int
    behind: int = 1
    stake: int

    def with_others(self, other: "Standing") -> "Standing":
        """Of both together."""
        ahead = max(self, other, key=lambda standing: (standing.completed, -standing.holder))
        least = min(self.reachable, other.reachable)
        return Standing(
            completed=ahead.completed,
            holder=ahead.holder,
            kept_bytes=ahead.kept_bytes,
            reachable=least,
            behind=sum(standing.behind for standing in (self, other) if standing.reachable == least),
            stake=max(self.stake, other.stake),
        )

    def missing(self, number: int) -> int:
        """How many of them cannot hand out this operation's result; it is the last one that any of all ranks has."""
        return self.behind if self.reachable < number else 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Agreement:
    """All ranks together, this rank and those below it in the tree, and the parts of the tree right below it."""

    whole: Standing
    part: Standing
    below: Mapping[int, Standing]


def agree(rank: int, size: int, mine: Standing) -> Generator[Command, Tensor, Agreement]:
    """The same `whole` on all ranks."""
    part = mine
    below: dict[int, Standing] = {}
    like = torch.empty(_WORDS, dtype=torch.int64)
    for child in children_of(rank, size):
        below[child] = _read((yield Receive(child, like)))
        part = part.with_others(below[child])
    whole = part
    if rank:
        yield Send(parent_of(rank), _written(part))
        whole = _read((yield Receive(parent_of(rank), like)))
    for child in below:
        yield Send(child, _written(whole))
    return Agreement(whole=whole, part=part, below=below)


def hand_over(rank: int, agreed: Agreement, kept: Tensor) -> Collective:
    """`kept`, `whole.kept_bytes` of bytes, becomes that of the holder on all ranks that miss it, and on its way there.

    It goes up from the holder as far as somebody is to be reached, and down wherever somebody misses it.
    """
    last, holder = agreed.whole.completed, agreed.whole.holder
    missing, missing_here = agreed.whole.missing(last), agreed.part.missing(last)
    from_child = next((child for child in agreed.below if _is_below(holder, child)), None)
    passes = rank == holder or from_child is not None
    if from_child is not None and missing > agreed.below[from_child].missing(last):
        kept.copy_((yield Receive(from_child, kept)))
    if passes and rank and missing > missing_here:
        yield Send(parent_of(rank), kept)
    if not passes and missing_here:
        kept.copy_((yield Receive(parent_of(rank), kept)))
    for child, standing in agreed.below.items():
        if child != from_child and standing.missing(last):
            yield Send(child, kept)


def _is_below(rank: int, top: int) -> bool:
    """Whether a rank is this one or somewhere below it."""
    while rank > top:
        rank = parent_of(rank)
    return rank == top


def _written(standing: Standing) -> Tensor:
    return torch.tensor(
        [
            standing.completed,
            standing.holder,
            standing.kept_bytes,
            standing.reachable,
            standing.behind,
            standing.stake,
        ]
    )


def _read(words: Tensor) -> Standing:
    completed, holder, kept_bytes, reachable, behind, stake = words.tolist()
    return Standing(
        completed=completed, holder=holder, kept_bytes=kept_bytes, reachable=reachable, behind=behind, stake=stake
    )
