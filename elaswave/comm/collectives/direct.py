"""Direct: everybody sends to whom it concerns, in one hop. For few ranks, and where ranks have different data."""

from collections.abc import Sequence

from torch import Tensor

from elaswave.comm.collectives.commands import Collective, Placed, Receive, Send
from elaswave.comm.collectives.reduction import Combine


def others_from(place: int, size: int) -> list[int]:
    """All places but this one, starting with the next, so that not everybody begins with the same one."""
    return [(place + distance) % size for distance in range(1, size)]


def direct_exchange(rank: int, outgoing: Sequence[Tensor], incoming: Sequence[Tensor]) -> Collective:
    """`incoming[r]` becomes what rank r has as `outgoing[rank]`; lengths may differ and be 0."""
    incoming[rank].copy_(outgoing[rank])
    size = len(outgoing)
    for other in others_from(rank, size):
        yield Send(other, outgoing[other])
    for other in reversed(others_from(rank, size)):
        incoming[other].copy_((yield Receive(other, incoming[other])))


def direct_reduce_scatter(
    place: int, segments: Sequence[Tensor], combine: Combine, ranks: Sequence[int] | None = None
) -> Collective:
    """Segment `place` becomes the combination over all `ranks` (None: everybody), in their order; others stay.

    place: of this rank among `ranks`.
    """
    mine, size = segments[place], len(segments)
    ranks = range(size) if ranks is None else ranks
    for other in others_from(place, size):
        yield Send(ranks[other], segments[other])
    total: Tensor | None = None
    for other in range(size):
        if other == place:
            if total is not None:
                combine(mine, total)  # the other way round than in order: combinations of two are commutative
            total = mine
        elif total is None:
            total = yield Receive(ranks[other], mine)
        else:
            combine(total, (yield Receive(ranks[other], mine)))


def direct_all_gather(place: int, segments: Sequence[Tensor], ranks: Sequence[int] | None = None) -> Collective:
    """Every segment becomes that of the rank of its place among `ranks` (None: everybody)."""
    size = len(segments)
    ranks = range(size) if ranks is None else ranks
    for other in others_from(place, size):
        yield Send(ranks[other], segments[place])
    for other in reversed(others_from(place, size)):
        received = yield Receive(ranks[other], segments[other])
        segments[other].copy_(received)
        yield Placed(segments[other], received)


def direct_scatter(rank: int, root: int, outgoing: Sequence[Tensor], incoming: Tensor) -> Collective:
    """Rank r gets `outgoing[r]` of the root; elsewhere `outgoing` is empty."""
    if rank != root:
        incoming.copy_((yield Receive(root, incoming)))
        return
    for other in others_from(rank, len(outgoing)):
        yield Send(other, outgoing[other])
    incoming.copy_(outgoing[root])


def direct_gather(rank: int, root: int, outgoing: Tensor, incoming: Sequence[Tensor]) -> Collective:
    """`incoming[r]` of the root becomes what rank r has; elsewhere `incoming` is empty."""
    if rank != root:
        yield Send(root, outgoing)
        return
    incoming[root].copy_(outgoing)
    for other in others_from(rank, len(incoming)):
        incoming[other].copy_((yield Receive(other, incoming[other])))
