"""Gradient of one layer for one micro-batch, as autograd left it, and where in the layer's blocks it belongs."""

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from elaswave.core.ids import BlockId
from elaswave.core.parameters import BlockLayout, Placement
from elaswave.runtime.kernels import KERNELS, PackedGradient

LARGE_ELEMENTS: Final = 65536
"""Without compiled kernels, gradients of parameters from here on are added up where they are. Smaller ones are gathered
first: a copy of them takes less than the calls for each, even than one call of torch._foreach_add_ for all (1.4 times
as long for 12)."""


class Spans:
    """Parts of a block: (start, length), ascending, not overlapping. Values only."""

    __slots__ = ("lengths", "packed", "starts")

    def __init__(self, parts: Sequence[tuple[int, int]]) -> None:
        self.starts = tuple(start for start, _ in parts)
        self.lengths = tuple(length for _, length in parts)
        self.packed = b"".join(struct.pack("=qq", *part) for part in parts)


@dataclass(frozen=True, slots=True)
class BlockGradient:
    """Gradient of a whole block of `elements`: `values` at their `spans`, zero elsewhere and where there is None.

    Values are contiguous, in host memory, all of `dtype`.
    """

    elements: int
    spans: Spans
    values: tuple[Tensor | None, ...]
    dtype: torch.dtype

    @property
    def packed(self) -> PackedGradient:
        """The same for kernels."""
        return self.elements, self.spans.packed, self.values, self.dtype, self.dtype is torch.bfloat16

    def flat(self) -> Tensor:
        """All of it in one tensor of its own."""
        flat = torch.zeros(self.elements, dtype=self.dtype)
        for start, length, values in zip(self.spans.starts, self.spans.lengths, self.values, strict=True):
            if values is not None:
                flat[start : start + length] = values.reshape(-1)
        return flat


def whole(values: Tensor) -> BlockGradient:
    """A gradient that is in one flat tensor already."""
    return BlockGradient(values.numel(), Spans([(0, values.numel())]), (values,), values.dtype)


Contribution = Mapping[BlockId, BlockGradient]


class _BlockSources:
    """Where the values of one block's spans come from: the gradient of a parameter, by its index, or a buffer."""

    def __init__(self, block: BlockId, elements: int, spans: Spans, sources: Sequence[int | Tensor]) -> None:
        self.block = block
        self.elements = elements
        self.spans = spans
        self._sources = tuple(sources)

    def values(self, gradients: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
        strided = torch.strided  # all in one expression: a call for each parameter costs more than its look
        return tuple(
            [
                found if found is None or (found.layout is strided and found.is_contiguous()) else _plain(found)
                for found in [gradients[source] if isinstance(source, int) else source for source in self._sources]
            ]
        )


class GradientGatherer:
    """Makes contributions of one layer."""

    def __init__(
        self,
        layout: BlockLayout,
        places: Sequence[Placement],
        dtype: torch.dtype,
        device: torch.device,
        *,
        in_place: bool | None = None,
    ) -> None:
        """`places`: of the layer's parameters, in their order.

        in_place: leave all gradients where autograd made them; None: where compiled kernels add them up from there.
        """
        self._dtype = dtype
        self._device = device
        self._small: list[tuple[int, Tensor]] = []
        self._blocks: list[_BlockSources] = []
        if in_place is None:
            in_place = KERNELS is not None and device.type == "cpu"
        for block in sorted({place.block for place in places}):
            here = [(index, place) for index, place in enumerate(places) if place.block == block]
            here.sort(key=lambda found: found[1].offset)
            elements = layout.blocks[block].elements
            parts = _each(here) if in_place else self._joined(here, elements)
            spans = Spans([(start, length) for start, length, _ in parts])
            self._blocks.append(_BlockSources(block, elements, spans, [source for _, _, source in parts]))

    def _joined(self, here: Sequence[tuple[int, Placement]], elements: int) -> list[tuple[int, int, int | Tensor]]:
        """Parts without gaps: large parameters, by their index, and buffers for small ones and for gaps."""
        parts: list[tuple[int, int, int | Tensor]] = []
        small: list[tuple[int, Placement]] = []
        start = 0
        for index, place in here:
            if place.elements < LARGE_ELEMENTS:
                small.append((index, place))
                continue
            parts += self._buffer(start, place.offset, small)
            parts.append((place.offset, place.elements, index))
            start, small = place.stop, []
        return parts + self._buffer(start, elements, small)

    def _buffer(
        self, start: int, stop: int, small: Sequence[tuple[int, Placement]]
    ) -> list[tuple[int, int, int | Tensor]]:
        """What lies between two large parameters, if anything does; every contribution overwrites it."""
        if stop == start:
            return []
        buffer = torch.zeros(stop - start, dtype=self._dtype, device=self._device)
        for index, place in small:
            self._small.append((index, buffer[place.offset - start : place.stop - start].view(place.shape)))
        return [(start, stop - start, buffer)]

    def gather(self, gradients: Sequence[Tensor | None]) -> Contribution:
        """`gradients`: by parameter, None where it took no part: zero. Valid until the next call."""
        if self._small:
            self._copy_small(gradients)
        return {
            found.block: BlockGradient(found.elements, found.spans, self._on_host(found.values(gradients)), self._dtype)
            for found in self._blocks
        }

    def _on_host(self, values: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
        if self._device.type == "cpu":
            return values
        return tuple([None if found is None else found.to("cpu") for found in values])

    def _copy_small(self, gradients: Sequence[Tensor | None]) -> None:
        missing = [view for index, view in self._small if gradients[index] is None]
        if missing:
            torch._foreach_zero_(missing)
        found = [(view, _dense(gradient)) for index, view in self._small if (gradient := gradients[index]) is not None]
        if found:
            # One call for all.
            torch._foreach_copy_([view for view, _ in found], [gradient for _, gradient in found])


def _each(here: Sequence[tuple[int, Placement]]) -> list[tuple[int, int, int | Tensor]]:
    """Every parameter by itself, by its index."""
    return [(place.offset, place.elements, index) for index, place in here]


def _plain(gradient: Tensor) -> Tensor:
    """Row-major, without gaps."""
    return _dense(gradient).contiguous()


def _dense(gradient: Tensor) -> Tensor:
    return gradient if gradient.layout is torch.strided else gradient.to_dense()
