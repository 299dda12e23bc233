"""Tree: up to the root and down again, in a number of hops that grows with the logarithm. For what is small."""

from collections.abc import Sequence
from itertools import accumulate, pairwise

from torch import Tensor

from elaswave.comm.collectives.commands import Collective, Placed, Receive, Send
from elaswave.comm.collectives.reduction import Combine

FAN_OUT = 3
"""Children of a rank. A wider tree has fewer levels, of which each costs a change of process."""


def children_of(rank: int, size: int) -> range:
    """Ranks right below this one."""
    first = FAN_OUT * rank + 1
    return range(min(first, size), min(first + FAN_OUT, size))


def parent_of(rank: int) -> int:
    """The rank right above this one, which is not the root."""
    return (rank - 1) // FAN_OUT


def tree_reduce(rank: int, size: int, tensor: Tensor, combine: Combine) -> Collective:
    """Rank 0 gets the combination over all ranks, in a fixed order; on other ranks `tensor` holds that of its part."""
    for child in children_of(rank, size):
        combine(tensor, (yield Receive(child, tensor)))
    if rank:
        yield Send(parent_of(rank), tensor)


def tree_broadcast(rank: int, size: int, tensor: Tensor) -> Collective:
    """Every rank gets the tensor of rank 0."""
    if rank:
        received = yield Receive(parent_of(rank), tensor)
        tensor.copy_(received)
        yield Placed(tensor, received)
    for child in children_of(rank, size):
        yield Send(child, tensor)


def tree_all_reduce(rank: int, size: int, tensor: Tensor, combine: Combine) -> Collective:
    """Every rank gets the combination over all ranks."""
    yield from tree_reduce(rank, size, tensor, combine)
    yield from tree_broadcast(rank, size, tensor)


def tree_all_gather(rank: int, whole: Tensor, lengths: Sequence[int]) -> Collective:
    """Every segment of `whole`, of these lengths, becomes that of the rank of its number.

    Ranks stand in the tree so that those below one have the numbers next to its own: what they have is one piece.
    """
    size = len(lengths)
    places = _places_below(0, size)
    rank_at = {place: index for index, place in enumerate(places)}
    starts = [0, *accumulate(lengths)]
    place = places[rank]
    children = [rank_at[child] for child in children_of(place, size)]
    last = rank + len(_places_below(place, size))
    for child, following in pairwise([*children, last]):
        part = whole[starts[child] : starts[following]]
        part.copy_((yield Receive(child, part)))
    if rank:
        parent = rank_at[parent_of(place)]
        yield Send(parent, whole[starts[rank] : starts[last]])
        received = yield Receive(parent, whole)
        whole.copy_(received)
        yield Placed(whole, received)
    for child in children:
        yield Send(child, whole)


def _places_below(place: int, size: int) -> list[int]:
    """This one and all below it, each before those below it."""
    found = [place]
    for child in children_of(place, size):
        found += _places_below(child, size)
    return found


def tree_barrier(rank: int, size: int, empty: Tensor) -> Collective:
    """Nobody leaves before everybody has entered. `empty` has no elements."""
    yield from tree_all_reduce(rank, size, empty, _nothing)


def _nothing(into: Tensor, other: Tensor) -> None:
    del into, other
