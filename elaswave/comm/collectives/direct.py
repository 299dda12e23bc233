"""Direct: everybody sends to whom it concerns, in one hop. For few ranks, and where ranks have different data."""

from collections.abc import Sequence

from torch import Tensor

from elaswave.comm.collectives.commands import Collective, Receive, Send
from elaswave.comm.collectives.reduction import Combine


def others_from(rank: int, size: int) -> list[int]:
    """All ranks but this one, starting with the next, so that not everybody begins with the same one."""
    return [(rank + distance) % size for distance in range(1, size)]


def direct_exchange(rank: int, outgoing: Sequence[Tensor], incoming: Sequence[Tensor]) -> Collective:
    """`incoming[r]` becomes what rank r has as `outgoing[rank]`; lengths may differ and be 0."""
    incoming[rank].copy_(outgoing[rank])
    size = len(outgoing)
    for other in others_from(rank, size):
        yield Send(other, outgoing[other])
    for other in reversed(others_from(rank, size)):
        incoming[other].copy_((yield Receive(other, incoming[other])))


def direct_reduce_scatter(rank: int, segments: Sequence[Tensor], combine: Combine) -> Collective:
    """Segment `rank` becomes the combination over all ranks, combined in the order of ranks; others stay."""
    size = len(segments)
    for other in others_from(rank, size):
        yield Send(other, segments[other])
    parts: list[Tensor] = []
    for other in range(size):
        parts.append(segments[rank] if other == rank else (yield Receive(other, segments[rank])))
    total = parts[0] if rank else parts[0].clone()
    for part in parts[1:]:
        combine(total, part)
    segments[rank].copy_(total)


def direct_all_gather(rank: int, segments: Sequence[Tensor]) -> Collective:
    """Every segment becomes that of the rank of its number."""
    size = len(segments)
    for other in others_from(rank, size):
        yield Send(other, segments[rank])
    for other in reversed(others_from(rank, size)):
        segments[other].copy_((yield Receive(other, segments[other])))


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
