"""Gradient of one layer for one micro-batch, as autograd left it: large parameters in place, small ones gathered."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from elaswave.core.ids import BlockId
from elaswave.core.parameters import BlockLayout, Placement
from elaswave.errors import InvariantError

LARGE_ELEMENTS: Final = 65536
"""Gradients of parameters from here on are added up where they are. Smaller ones are gathered first: a copy of them
takes less than the calls for each, even than one call of torch._foreach_add_ for all (1.4 times as long for 12)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockGradient:
    """Gradient of a whole block, flat, zero where the layer has no parameter.

    pieces: (start, values) of consecutive parts, at least one, ascending, without gaps, in parameter dtype.
    """

    elements: int
    pieces: tuple[tuple[int, Tensor], ...]

    def flat(self) -> Tensor:
        """All of it in one tensor of its own."""
        return torch.cat([values for _, values in self.pieces])


def whole(values: Tensor) -> BlockGradient:
    """A gradient that is in one flat tensor already."""
    return BlockGradient(elements=values.numel(), pieces=((0, values),))


Contribution = Mapping[BlockId, BlockGradient]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Piece:
    """Elements from `start` on: those of a large parameter, by its index, or a buffer for small ones and for gaps."""

    start: int
    parameter: int | None
    buffer: Tensor | None


class GradientGatherer:
    """Makes contributions of one layer. Small parameters share buffers, which every contribution overwrites."""

    def __init__(
        self, layout: BlockLayout, places: Sequence[Placement], dtype: torch.dtype, device: torch.device
    ) -> None:
        """`places`: of the layer's parameters, in their order."""
        self._places = tuple(places)
        self._elements = {place.block: layout.blocks[place.block].elements for place in places}
        self._dtype = dtype
        self._device = device
        self._small: list[tuple[int, Tensor]] = []
        self._pieces = {block: self._divide(block) for block in sorted(self._elements)}

    def _divide(self, block: BlockId) -> list[_Piece]:
        here = [index for index, place in enumerate(self._places) if place.block == block]
        here.sort(key=lambda index: self._places[index].offset)
        pieces: list[_Piece] = []
        small: list[int] = []
        start = 0
        for index in here:
            if self._places[index].elements < LARGE_ELEMENTS:
                small.append(index)
                continue
            pieces += self._buffer(start, self._places[index].offset, small)
            pieces.append(_Piece(start=self._places[index].offset, parameter=index, buffer=None))
            start = self._places[index].stop
            small = []
        pieces += self._buffer(start, self._elements[block], small)
        nothing = torch.empty(0, dtype=self._dtype, device=self._device)
        return pieces or [_Piece(start=0, parameter=None, buffer=nothing)]

    def _buffer(self, start: int, stop: int, small: list[int]) -> list[_Piece]:
        """What lies between two large parameters, if anything does."""
        if stop == start:
            return []
        buffer = torch.zeros(stop - start, dtype=self._dtype, device=self._device)
        for index in small:
            place = self._places[index]
            self._small.append((index, buffer[place.offset - start : place.stop - start].view(place.shape)))
        return [_Piece(start=start, parameter=None, buffer=buffer)]

    def gather(self, gradients: Sequence[Tensor | None]) -> Contribution:
        """`gradients`: by parameter, None where it took no part: zero. Valid until the next call."""
        missing = [view for index, view in self._small if gradients[index] is None]
        if missing:
            torch._foreach_zero_(missing)
        found = [(view, _dense(gradient)) for index, view in self._small if (gradient := gradients[index]) is not None]
        if found:
            # One call for all. Letting autograd add into .grad views of a zeroed buffer took as long within the noise
            # of the measurement (1.0 of this, three sizes of block), and would turn a gradient of -0 into +0.
            torch._foreach_copy_([view for view, _ in found], [gradient for _, gradient in found])
        return {
            block: BlockGradient(
                elements=self._elements[block],
                pieces=tuple((piece.start, self._values(piece, gradients)) for piece in pieces),
            )
            for block, pieces in self._pieces.items()
        }

    def _values(self, piece: _Piece, gradients: Sequence[Tensor | None]) -> Tensor:
        if piece.buffer is not None:
            return piece.buffer
        if piece.parameter is None:
            raise InvariantError(f"elements from {piece.start} on are neither in a buffer nor of a parameter")
        gradient = gradients[piece.parameter]
        if gradient is None:
            elements = self._places[piece.parameter].elements
            return torch.zeros(elements, dtype=self._dtype, device=self._device)
        return _dense(gradient).reshape(-1)


def _dense(gradient: Tensor) -> Tensor:
    return gradient if gradient.layout is torch.strided else gradient.to_dense()
