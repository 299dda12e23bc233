"""Grid: ranks as points of a grid, where everybody exchanges directly along one dimension after the other.

As many bytes as round a ring, in far fewer frames. One dimension is a direct exchange; dimensions of 2 are recursive
halving and doubling; see Thakur, Rabenseifner, Gropp, "Optimization of Collective Communication Operations in MPICH",
2005.
"""

from collections.abc import Iterator, Sequence
from itertools import accumulate, pairwise

from torch import Tensor

from elaswave.comm.collectives.commands import Collective
from elaswave.comm.collectives.composed import placed
from elaswave.comm.collectives.direct import direct_all_gather, direct_reduce_scatter
from elaswave.comm.collectives.reduction import Combine, even_segments, split, whole_of
from elaswave.comm.collectives.tree import tree_all_reduce


def dimensions_of(size: int) -> tuple[int, ...]:
    """Lengths of the dimensions, of which the product is the number of ranks: its prime factors.

    The shorter the dimensions, the fewer the frames; one hop more costs less than the frames that it saves.
    """
    found: list[int] = []
    length = 2
    while size > 1:
        while size % length == 0:
            size //= length
            found.append(length)
        length += 1
    return tuple(found)


class _Line:
    """The ranks that differ from one in a single dimension, and the part of the whole that each of them answers for."""

    def __init__(self, rank: int, length: int, stride: int, whole: Tensor, starts: Sequence[int]) -> None:
        """stride: between ranks that are next to each other on the line. starts: of the segments in the whole."""
        first = rank // (length * stride) * length * stride
        self.place = (rank - first) // stride
        self.ranks = range(first + rank % stride, first + length * stride, stride)
        bounds = [starts[first + place * stride] for place in range(length + 1)]
        self.parts = [whole[begin:end] for begin, end in pairwise(bounds)]


def _lines(rank: int, whole: Tensor, lengths: Sequence[int]) -> Iterator[_Line]:
    """From the dimension in which ranks are farthest apart to that of neighbours."""
    starts = [0, *accumulate(lengths)]
    stride = len(lengths)
    for length in dimensions_of(len(lengths)):
        stride //= length
        yield _Line(rank, length, stride, whole, starts)


def grid_reduce_scatter(rank: int, whole: Tensor, lengths: Sequence[int], combine: Combine) -> Collective:
    """Segment `rank` of `whole` becomes the combination over all ranks; the others hold partial ones afterwards."""
    for line in _lines(rank, whole, lengths):
        yield from direct_reduce_scatter(line.place, line.parts, combine, line.ranks)


def grid_all_gather(rank: int, segments: Sequence[Tensor], whole: Tensor | None = None) -> Collective:
    """Every segment becomes that of the rank of its number. whole: of which they are the parts, one after the other."""
    lengths = [segment.numel() for segment in segments]
    parts: Sequence[Tensor] = segments
    if whole is None:
        whole = whole_of(segments)
        parts = split(whole, lengths)
        _copy([segments[rank]], [parts[rank]])
    for line in reversed(list(_lines(rank, whole, lengths))):
        yield from direct_all_gather(line.place, line.parts, line.ranks)
    if parts is not segments:
        _copy(parts, segments)


def _copy(given: Sequence[Tensor], taken: Sequence[Tensor]) -> None:
    for source, target in zip(given, taken, strict=True):
        if source.data_ptr() != target.data_ptr():
            target.copy_(source)


def grid_all_reduce(rank: int, size: int, whole: Tensor, combine: Combine) -> Collective:
    """Every rank gets the combination over all ranks."""
    lengths = even_segments(whole.numel(), size)
    yield from grid_reduce_scatter(rank, whole, lengths, combine)
    yield from grid_all_gather(rank, split(whole, lengths), whole)


def halved_all_reduce(rank: int, size: int, whole: Tensor, combine: Combine) -> Collective:
    """Every rank gets the combination over all ranks: pairs of them exchange halves, each half has a tree of its own.

    With an odd number of ranks it is one tree.
    """
    if size % 2:
        yield from tree_all_reduce(rank, size, whole, combine)
        return
    stride = size // 2
    place = rank // stride
    pair = range(rank % stride, size, stride)
    halves = split(whole, even_segments(whole.numel(), 2))
    yield from direct_reduce_scatter(place, halves, combine, pair)
    tree = tree_all_reduce(rank % stride, stride, halves[place], combine)
    yield from placed(tree, range(place * stride, (place + 1) * stride))
    yield from direct_all_gather(place, halves, pair)
