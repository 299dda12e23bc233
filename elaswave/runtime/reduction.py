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

    Squares of float32 are exact in float64. Each chunk of CHUNK_ELEMENTS is added up by itself, always in the same
    order, and chunks are added without rounding: slicing on chunk boundaries does not change the total.
    """
    elements = gradient.numel()
    if elements % CHUNK_ELEMENTS:
        raise InvariantError(f"a gradient has {elements} elements: must be a multiple of {CHUNK_ELEMENTS}")
    chunks = gradient.numpy().reshape(-1, CHUNK_ELEMENTS)
    sums = np.empty(len(chunks))
    room = np.empty((min(_CHUNKS_PER_PIECE, len(chunks)), CHUNK_ELEMENTS))
    for start in range(0, len(chunks), _CHUNKS_PER_PIECE):
        piece = chunks[start : start + _CHUNKS_PER_PIECE]
        wide = room[: len(piece)]
        np.copyto(wide, piece)
        np.einsum("ij,ij->i", wide, wide, out=sums[start : start + len(piece)])
    return exact_from_array(sums) if bool(np.isfinite(sums).all()) else None
