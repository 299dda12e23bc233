"""Shared memory: ranks of one host put their data where all can read it.

A rank writes to its own arena and reads those of others; in that of rank 0 all write one word that wakes who sleeps.
An arena has two slots, used in turn: who writes to one has passed a barrier that everybody enters after the last read
of it. Barriers are counters in the arenas.
"""

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from elaswave.comm.collectives.commands import Await, Collective
from elaswave.comm.collectives.reduction import Combine, even_segments, split
from elaswave.comm.futex import Word, wake
from elaswave.errors import ProtocolError

SLOTS = 2
HEADER_BYTES = 4096
SMALL_BYTES = 32 << 10

_ENTERED = 0  # places in the header of an arena, in words of 64 bits
_EXPECTED = 1  # and one more for the second slot
_WORD_BYTES = 8
_RELEASED_BYTE = 64  # on a line of the cache of its own; 32 bits, of rank 0 only
_LOW_BITS = 0xFFFFFFFF


class Arenas:
    """Arenas of all ranks, in their order: flat uint8 tensors of equal length. Belongs to one rank and epoch."""

    def __init__(self, rank: int, arenas: Sequence[Tensor], turns: int) -> None:
        """turns: how often slots have changed, the same on all ranks.

        No rank has entered a barrier of this or a later turn. All run the same operations from here on, so that turns,
        which number slots and barriers, stay in step.
        """
        self.rank = rank
        self.size = len(arenas)
        self.turns = turns
        self._arenas = tuple(arenas)
        self._half_bytes = (arenas[0].numel() - HEADER_BYTES) // (2 * SLOTS) // 64 * 64
        self._heads = [arena[:_RELEASED_BYTE].numpy().data.cast("Q") for arena in arenas]
        self._released = arenas[0][_RELEASED_BYTE : _RELEASED_BYTE + 4].numpy().data.cast("I")
        self._released_address = arenas[0].data_ptr() + _RELEASED_BYTE

    def capacity(self, dtype: torch.dtype) -> int:
        """Elements of a piece."""
        return self._half_bytes // dtype.itemsize

    def advance(self) -> None:
        """Use the other slot from now on."""
        self.turns += 1

    def enter(self, expected_bytes: int) -> Collective:
        """The first barrier of a turn, after this rank has given its part.

        Raises ProtocolError, on all ranks, where they do not expect the same amount of data.
        """
        place = _EXPECTED + self.turns % SLOTS
        self._heads[self.rank][place] = expected_bytes
        yield from self._barrier(2 * self.turns + 1)
        for rank, head in enumerate(self._heads):
            if head[place] != expected_bytes:
                raise ProtocolError(
                    f"rank {rank} works on {head[place]} bytes, while rank {self.rank} expects {expected_bytes} bytes: "
                    "all ranks must call the same operations with the same shapes"
                )

    def meet(self) -> Collective:
        """The second barrier of a turn, after this rank has made its part of the result."""
        yield from self._barrier(2 * self.turns + 2)

    def _barrier(self, number: int) -> Collective:
        """Nobody leaves before everybody has entered. Needs a processor that keeps the order of stores, as x86-64.

        Who sleeps is woken once, when all are in. Of two that enter last one sees the other at the latest when it is
        about to sleep: between its own store and its second look it has taken a lock, which no load overtakes.
        """
        self._heads[self.rank][_ENTERED] = number
        for distance in range(1, self.size):
            rank = (self.rank + distance) % self.size
            if self._heads[rank][_ENTERED] < number:
                yield Await(rank, partial(self._is_in, rank, number), self._word)
        if self._released[0] != number & _LOW_BITS:
            self._released[0] = number & _LOW_BITS
            wake(self._released_address)

    def _is_in(self, rank: int, number: int) -> bool:
        return self._heads[rank][_ENTERED] >= number

    def _word(self) -> Word:
        return Word(self._released_address, self._released[0])

    def given(self, rank: int, like: Tensor) -> Tensor:
        """Where a rank puts its own data; a view with the length and dtype of `like`."""
        return self._view(2 * (self.turns % SLOTS), rank, like)

    def made(self, rank: int, like: Tensor) -> Tensor:
        """Where a rank puts its part of the result."""
        return self._view(2 * (self.turns % SLOTS) + 1, rank, like)

    def _view(self, half: int, rank: int, like: Tensor) -> Tensor:
        start = HEADER_BYTES + half * self._half_bytes
        return self._arenas[rank][start : start + like.numel() * like.element_size()].view(like.dtype)


def shared_all_reduce(arenas: Arenas, tensor: Tensor, combine: Combine) -> Collective:
    """`tensor` becomes the combination over all ranks, in the order of ranks.

    Who passes the last barrier has its result, and everybody else can still read it: see `shared_catch_up`.
    """
    nbytes = tensor.numel() * tensor.element_size()
    if nbytes <= SMALL_BYTES:
        arenas.given(arenas.rank, tensor).copy_(tensor)
        yield from arenas.enter(nbytes)
        _combine_all(arenas, tensor, combine)
        arenas.advance()
        return
    for piece in split(tensor, _pieces(tensor, arenas)):
        segments = even_segments(piece.numel(), arenas.size)
        arenas.given(arenas.rank, piece).copy_(piece)
        yield from arenas.enter(nbytes)
        _combine_segment(arenas, piece, segments, combine)
        yield from arenas.meet()
        _collect(arenas, piece, segments)
        arenas.advance()


def shared_catch_up(arenas: Arenas, tensor: Tensor, combine: Combine) -> None:
    """Finish an all-reduce that has waited in its last barrier, and that another rank has completed."""
    if tensor.numel() * tensor.element_size() <= SMALL_BYTES:
        _combine_all(arenas, tensor, combine)
    else:
        pieces = split(tensor, _pieces(tensor, arenas))
        _collect(arenas, pieces[-1], even_segments(pieces[-1].numel(), arenas.size))
    arenas.advance()  # others may still have to do the same: this rank must not write there in the next epoch


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
        yield from arenas.enter(_bytes_of(segments))
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
        yield from arenas.enter(_bytes_of(segments))
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


def _bytes_of(segments: Sequence[Tensor]) -> int:
    return sum(segment.numel() * segment.element_size() for segment in segments)
