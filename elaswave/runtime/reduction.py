"""Complete gradients of shards and their norms."""

from collections.abc import Sequence
from typing import Final

import numpy as np
from torch import Tensor

from elaswave.core.exact import Exact, exact_from_array
from elaswave.core.facts import LossScalars, ShardScalars
from elaswave.core.shape import CHUNK_ELEMENTS
from elaswave.errors import InvariantError
from elaswave.runtime.accumulation import Accumulation

_CHUNKS_PER_PIECE: Final = 32
_HALF: Final = CHUNK_ELEMENTS // 2
_APART: Final = 8
_WIDTHS: Final = tuple(_HALF >> level for level in range(1, _HALF.bit_length()))


def reduce_shard(
    accumulation: Accumulation, parts: Sequence[Tensor], micro_batches: int, loss: LossScalars | None = None
) -> tuple[Tensor, ShardScalars]:
    """Combine disjoint partial sums that cover all micro-batches: the mean gradient (float32) and its scalars.

    `loss` is what belongs to the parts of the loss shard. Two calls with the parts in another order or grouping give
    the same bits where the accumulation is exact.
    """
    gradient = accumulation.to_gradient(parts, micro_batches)
    norm_squared = sum_of_squares(gradient)
    return gradient, ShardScalars(norm_squared=norm_squared or 0, finite=norm_squared is not None, loss=loss)


def sum_of_squares(gradient: Tensor) -> Exact | None:
    """Sum of squares of a flat float32 gradient of whole chunks; None where some element is not finite.

    Squares of float32 are exact in float64. Each chunk of CHUNK_ELEMENTS is added up along a fixed tree of halves, and
    chunks are added without rounding: slicing on chunk boundaries does not change the total.
    """
    elements = gradient.numel()
    if elements % CHUNK_ELEMENTS:
        raise InvariantError(f"a gradient has {elements} elements: must be a multiple of {CHUNK_ELEMENTS}")
    chunks = gradient.numpy().reshape(-1, CHUNK_ELEMENTS)
    sums = np.empty(len(chunks))
    rows = min(_CHUNKS_PER_PIECE, len(chunks))
    # Both halves of a chunk in one buffer would lie 4096 bytes apart, which stalls loads behind stores.
    left, right = np.zeros((rows, _HALF)), np.zeros((rows, _HALF + _APART))[:, :_HALF]
    levels = [(left[:, :width], left[:, width : 2 * width]) for width in _WIDTHS]
    for start in range(0, len(chunks), _CHUNKS_PER_PIECE):
        piece = chunks[start : start + _CHUNKS_PER_PIECE]
        for half, source in ((left, piece[:, :_HALF]), (right, piece[:, _HALF:])):
            np.copyto(half[: len(piece)], source)
            np.multiply(half, half, half)
        np.add(left, right, left)
        for into, other in levels:
            np.add(into, other, into)
        sums[start : start + _CHUNKS_PER_PIECE] = left[: len(piece), 0]
    return exact_from_array(sums) if bool(np.isfinite(sums).all()) else None
