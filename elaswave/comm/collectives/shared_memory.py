"""Shared memory: ranks of one host put their data where all can read it; messages only say that it is there.

A rank writes to its own arena and reads those of others. An arena has two slots, used in turn by piece after piece: who
writes to one has passed a barrier that everybody enters after the last read of it. Barriers are counters in the arenas.
"""

from collections.abc import Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor

from elaswave.comm.collectives.commands import Await, Collective
from elaswave.comm.collectives.reduction import Combine, even_segments, split
from elaswave.comm.futex import wait_while, wake

SLOTS = 2
HEADER_BYTES = 4096
SMALL_BYTES = 32 << 10


class Arenas:
    """Arenas of all ranks, in their order: flat uint8 tensors of equal length. Belongs to one rank and epoch."""

    def __init__(self, rank: int, arenas: Sequence[Tensor], start: int) -> None:
        """start: the number of the last barrier that any rank has entered before.

        The slots of all ranks are in step, for all run the same operations from the beginning of an epoch on.
        """
        self.rank = rank
        self.size = len(arenas)
        self._arenas = tuple(arenas)
        self._half_bytes = (arenas[0].numel() - HEADER_BYTES) // (2 * SLOTS) // 64 * 64
        self._slot = 0
        self._counts = [arena[:8].numpy().view(np.uint64) for arena in arenas]
        self._count = start
        self._counts[rank][0] = start

    def capacity(self, dtype: torch.dtype) -> int:
        """Elements of a piece."""
        return self._half_bytes // dtype.itemsize

    def advance(self) -> None:
        """Use the other slot from now on."""
        self._slot = (self._slot + 1) % SLOTS

    def barrier(self) -> Collective:
        """Nobody leaves before everybody has entered. Needs a processor that keeps the order of stores, as x86-64."""
        self._count += 1
        self._counts[self.rank][0] = self._count
        wake(self._arenas[self.rank].data_ptr())
        for distance in range(1, self.size):
            rank = (self.rank + distance) % self.size
            if not self._is_in(rank):
                yield Await(rank, partial(self._is_in, rank), partial(self._block, rank))

    def _is_in(self, rank: int) -> bool:
        return bool(self._counts[rank][0] >= self._count)

    def _block(self, rank: int, limit_s: float) -> None:
        # Read first: the call returns at once where the counter has changed since.
        seen = int(self._counts[rank][0])
        if seen < self._count:
            wait_while(self._arenas[rank].data_ptr(), seen, limit_s)

    def given(self, rank: int, like: Tensor) -> Tensor:
        """Where a rank puts its own data; a view with the length and dtype of `like`."""
        return self._view(2 * self._slot, rank, like)

    def made(self, rank: int, like: Tensor) -> Tensor:
        """Where a rank puts its part of the result."""
        return self._view(2 * self._slot + 1, rank, like)

    def _view(self, half: int, rank: int, like: Tensor) -> Tensor:
        start = HEADER_BYTES + half * self._half_bytes
        return self._arenas[rank][start : start + like.numel() * like.element_size()].view(like.dtype)


def shared_all_reduce(arenas: Arenas, tensor: Tensor, combine: Combine) -> Collective:
    """`tensor` becomes the combination over all ranks, in the order of ranks.

    Who passes the last barrier has its result, and everybody else can still read it: see `shared_catch_up`.
    """
    if tensor.numel() * tensor.element_size() <= SMALL_BYTES:
        arenas.given(arenas.rank, tensor).copy_(tensor)
        yield from arenas.barrier()
        _combine_all(arenas, tensor, combine)
        arenas.advance()
        return
    for piece in split(tensor, _pieces(tensor, arenas)):
        segments = even_segments(piece.numel(), arenas.size)
        arenas.given(arenas.rank, piece).copy_(piece)
        yield from arenas.barrier()
        _combine_segment(arenas, piece, segments, combine)
        yield from arenas.barrier()
        _collect(arenas, piece, segments)
        arenas.advance()


def shared_catch_up(arenas: Arenas, tensor: Tensor, combine: Combine) -> None:
    """Finish an all-reduce that has waited in its last barrier, and that another rank has completed."""
    if tensor.numel() * tensor.element_size() <= SMALL_BYTES:
        _combine_all(arenas, tensor, combine)
        return
    pieces = split(tensor, _pieces(tensor, arenas))
    _collect(arenas, pieces[-1], even_segments(pieces[-1].numel(), arenas.size))


def _combine_all(arenas: Arenas, tensor: Tensor, combine: Combine) -> None:
    """Everybody for itself, in the order of ranks: less work than a second barrier."""
    tensor.copy_(arenas.given(0, tensor))
    for rank in range(1, arenas.size):
        combine(tensor, arenas.given(rank, tensor))


def _combine_segment(arenas: Arenas, piece: Tensor, segments: Sequence[int], combine: Combine) -> None:
    start = sum(segments[: arenas.rank])
    stop = start + segments[arenas.rank]
    total = arenas.made(arenas.rank, piece[start:stop])
    total.copy_(arenas.given(0, piece)[start:stop])
    for rank in range(1, arenas.size):
        combine(total, arenas.given(rank, piece)[start:stop])


def _collect(arenas: Arenas, piece: Tensor, segments: Sequence[int]) -> None:
    for rank, part in enumerate(split(piece, segments)):
        part.copy_(arenas.made(rank, part))


def shared_all_gather(arenas: Arenas, segments: Sequence[Tensor]) -> Collective:
    """Every segment becomes that of the rank of its number; lengths may differ."""
    capacity = arenas.capacity(segments[0].dtype)
    for start in range(0, max(1, *(segment.numel() for segment in segments)), capacity):
        pieces = [segment[start : start + capacity] for segment in segments]
        arenas.given(arenas.rank, pieces[arenas.rank]).copy_(pieces[arenas.rank])
        yield from arenas.barrier()
        for rank, piece in enumerate(pieces):
            if rank != arenas.rank:
                piece.copy_(arenas.given(rank, piece))
        arenas.advance()


def shared_reduce_scatter(arenas: Arenas, segments: Sequence[Tensor], combine: Combine) -> Collective:
    """Segment `rank` becomes the combination over all ranks, in their order; the others stay."""
    capacity = arenas.capacity(segments[0].dtype) // arenas.size
    mine = segments[arenas.rank]
    for start in range(0, max(1, *(segment.numel() for segment in segments)), capacity):
        pieces = [segment[start : start + capacity] for segment in segments]
        whole = torch.cat(pieces)
        arenas.given(arenas.rank, whole).copy_(whole)
        yield from arenas.barrier()
        offset = sum(piece.numel() for piece in pieces[: arenas.rank])
        length = pieces[arenas.rank].numel()
        total = mine[start : start + length]
        total.copy_(arenas.given(0, whole)[offset : offset + length])
        for rank in range(1, arenas.size):
            combine(total, arenas.given(rank, whole)[offset : offset + length])
        arenas.advance()


def _pieces(tensor: Tensor, arenas: Arenas) -> list[int]:
    capacity = arenas.capacity(tensor.dtype)
    whole, rest = divmod(tensor.numel(), capacity)
    return [capacity] * whole + ([rest] if rest or not whole else [])
