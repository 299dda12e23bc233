"""Ring: every rank sends to the next one only, and each byte passes every link once. For what is large.

Thakur, Rabenseifner, Gropp, "Optimization of Collective Communication Operations in MPICH", 2005.
"""

from collections.abc import Sequence

from torch import Tensor

from elaswave.comm.collectives.commands import Collective, Receive, Send
from elaswave.comm.collectives.reduction import Combine


def ring_reduce_scatter(rank: int, segments: Sequence[Tensor], combine: Combine) -> Collective:
    """Segment `rank` becomes the combination over all ranks; the other segments hold partial ones afterwards.

    The combination of segment s starts at rank s + 1 and ends at rank s, in this order on every run.
    """
    size = len(segments)
    following, before = (rank + 1) % size, (rank - 1) % size
    for turn in range(size - 1):
        yield Send(following, segments[(rank - turn - 1) % size])
        arriving = segments[(rank - turn - 2) % size]
        combine(arriving, (yield Receive(before, arriving)))


def ring_all_gather(rank: int, segments: Sequence[Tensor]) -> Collective:
    """Every segment becomes that of the rank of its number."""
    size = len(segments)
    following, before = (rank + 1) % size, (rank - 1) % size
    for turn in range(size - 1):
        yield Send(following, segments[(rank - turn) % size])
        arriving = segments[(rank - turn - 1) % size]
        arriving.copy_((yield Receive(before, arriving)))


def ring_all_reduce(rank: int, segments: Sequence[Tensor], combine: Combine) -> Collective:
    """Every segment becomes the combination over all ranks."""
    yield from ring_reduce_scatter(rank, segments, combine)
    yield from ring_all_gather(rank, segments)
