"""Shared memory: ranks of one host put their data where all can read it.

A rank writes to its own arena and reads those of others; in that of rank 0 all write one word that wakes who sleeps.
An arena has two slots, used in turn: who writes to one has passed a barrier that everybody enters after the last read
of it. Barriers are counters in the arenas.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
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
        self._halves: dict[tuple[int, int, torch.dtype], Tensor] = {}

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

    def given(self, rank: int, dtype: torch.dtype) -> Tensor:
        """Where a rank puts its own data: room for a piece."""
        return self._half(2 * (self.turns % SLOTS), rank, dtype)

    def made(self, rank: int, dtype: torch.dtype) -> Tensor:
        """Where a rank puts its part of the result: room for a piece."""
        return self._half(2 * (self.turns % SLOTS) + 1, rank, dtype)

    def _half(self, half: int, rank: int, dtype: torch.dtype) -> Tensor:
        found = self._halves.get((half, rank, dtype))
        if found is None:
            start = HEADER_BYTES + half * self._half_bytes
            found = self._halves[half, rank, dtype] = self._arenas[rank][start : start + self._half_bytes].view(dtype)
        return found


@dataclass(frozen=True, slots=True, kw_only=True)
class SharedCollective:
    """Who has passed its last barrier has the result, and everybody else can still read it.

    catch_up: take the result, where `collective` waits in its last barrier and another rank has completed its own.
    """

    collective: Collective
    catch_up: Callable[[], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Turn:
    """given: what this rank gives, one after the other. take: what it does when all have given theirs."""

    given: Sequence[Tensor]
    take: Callable[[], None]


def shared_all_reduce(arenas: Arenas, tensor: Tensor, combine: Combine) -> SharedCollective:
    """`tensor` becomes the combination over all ranks, in the order of ranks."""
    if tensor.nbytes <= SMALL_BYTES:
        # Everybody combines all of it: less work than a second barrier.
        turn = _Turn(given=[tensor], take=lambda: _combine(arenas, 0, tensor, combine))
        return _in_turns(arenas, [turn], tensor.nbytes)
    pieces = split(tensor, _lengths(tensor.numel(), arenas.capacity(tensor.dtype)))

    def collective() -> Collective:
        for piece in pieces:
            lengths = even_segments(piece.numel(), arenas.size)
            _give(arenas, [piece])
            yield from arenas.enter(tensor.nbytes)
            made = arenas.made(arenas.rank, tensor.dtype)[: lengths[arenas.rank]]
            _combine(arenas, sum(lengths[: arenas.rank]), made, combine)
            yield from arenas.meet()
            _collect_made(arenas, piece)
            arenas.advance()

    def catch_up() -> None:
        _collect_made(arenas, pieces[-1])
        arenas.advance()

    return SharedCollective(collective=collective(), catch_up=catch_up)


def shared_all_gather(arenas: Arenas, segments: Sequence[Tensor]) -> SharedCollective:
    """Every segment becomes that of the rank of its number; lengths may differ."""
    turns = [
        _Turn(given=[parts[arenas.rank]], take=partial(_collect_given, arenas, parts))
        for parts in _in_parts(segments, arenas.capacity(segments[0].dtype))
    ]
    return _in_turns(arenas, turns, _bytes_of(segments))


def shared_reduce_scatter(
    arenas: Arenas, output: Tensor, segments: Sequence[Tensor], combine: Combine
) -> SharedCollective:
    """`output` becomes the combination of segment `rank` over all ranks, in their order; segments stay."""
    capacity = arenas.capacity(output.dtype) // arenas.size
    turns: list[_Turn] = []
    for index, parts in enumerate(_in_parts(segments, capacity)):
        first = sum(part.numel() for part in parts[: arenas.rank])
        into = output[index * capacity : (index + 1) * capacity]
        turns.append(_Turn(given=parts, take=partial(_combine, arenas, first, into, combine)))
    return _in_turns(arenas, turns, _bytes_of(segments))


def _in_turns(arenas: Arenas, turns: Sequence[_Turn], expected_bytes: int) -> SharedCollective:
    """Collectives of one barrier a turn."""

    def collective() -> Collective:
        for turn in turns:
            _give(arenas, turn.given)
            yield from arenas.enter(expected_bytes)
            turn.take()
            arenas.advance()

    def catch_up() -> None:
        turns[-1].take()
        arenas.advance()  # others may still have to do the same: this rank must not write there in the next epoch

    return SharedCollective(collective=collective(), catch_up=catch_up)


def _give(arenas: Arenas, tensors: Sequence[Tensor]) -> None:
    room = arenas.given(arenas.rank, tensors[0].dtype)
    lengths = [tensor.numel() for tensor in tensors]
    torch._foreach_copy_(split(room[: sum(lengths)], lengths), list(tensors))


def _combine(arenas: Arenas, first: int, into: Tensor, combine: Combine) -> None:
    """Of what all have given, from element `first` on, in the order of ranks."""
    last = first + into.numel()
    into.copy_(arenas.given(0, into.dtype)[first:last])
    for rank in range(1, arenas.size):
        combine(into, arenas.given(rank, into.dtype)[first:last])


def _collect_made(arenas: Arenas, piece: Tensor) -> None:
    segments = split(piece, even_segments(piece.numel(), arenas.size))
    made = [arenas.made(rank, piece.dtype)[: segment.numel()] for rank, segment in enumerate(segments)]
    torch._foreach_copy_(segments, made)


def _collect_given(arenas: Arenas, parts: Sequence[Tensor]) -> None:
    others = [rank for rank in range(arenas.size) if rank != arenas.rank]
    given = [arenas.given(rank, parts[rank].dtype)[: parts[rank].numel()] for rank in others]
    if others:
        torch._foreach_copy_([parts[rank] for rank in others], given)


def _in_parts(segments: Sequence[Tensor], capacity: int) -> list[Sequence[Tensor]]:
    """The segments in parts of at most `capacity` elements each; at least one part."""
    longest = max(segment.numel() for segment in segments)
    if longest <= capacity:
        return [segments]
    return [[segment[start : start + capacity] for segment in segments] for start in range(0, longest, capacity)]


def _lengths(elements: int, limit: int) -> list[int]:
    whole, rest = divmod(elements, limit)
    return [limit] * whole + [rest] * (rest > 0)


def _bytes_of(segments: Sequence[Tensor]) -> int:
    return sum(segment.nbytes for segment in segments)
