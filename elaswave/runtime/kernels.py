"""The compiled passes of _kernels.c, where the installation had a compiler: one over memory instead of several.

Everything here has a form in numpy and torch beside it, which gives the same bits and runs where this is missing.
"""

from collections.abc import Sequence
from typing import Final, Protocol

import torch
from torch import Tensor

from elaswave.errors import InvariantError

PackedGradient = tuple[int, bytes, tuple[Tensor | None, ...], torch.dtype, bool]
"""Elements of a block; its spans, pairs of int64, start and length, ascending; the values of each, or None for zeros;
their type, and whether that is bfloat16, not float32."""

PLAIN_SUM: Final = -1.0
"""The bound of sums that are not exact."""


class Kernels(Protocol):
    """What the compiled module offers; addresses are those of contiguous host memory that nobody else writes."""

    def accumulate(self, total: int, gradient: PackedGradient, first: bool, rounder: float, bound: float, /) -> int:
        """Add a gradient to `total`, or where it is the first make the total hold just that.

        `bound` below 0: the total is float32. Else it is float64, elements are rounded by `rounder`, and those beyond
        the bound replaced by it. Returns how many were. Raises ValueError where spans or values do not fit.
        """

    def mean(self, into: int, parts: list[int], elements: int, divisor: float, wide: bool, /) -> None:
        """Write the sum of the parts (float64 if `wide`, else float32) over `divisor` as float32."""

    def adamw(self, vectors: list[int], elements: int, constants: bytes, /) -> None:
        """One update by AdamW in place: master values, averages, averages of squares, gradient, all float32.

        `constants`: nine float32, in the order of the C function. Raises ValueError for other numbers of either.
        """

    def finite(self, address: int, elements: int, bfloat16: bool, /) -> bool:
        """Whether none of these elements, float32 or bfloat16, is infinite or not a number."""


def load_kernels() -> Kernels | None:
    """The compiled passes, or None where they were not compiled."""
    try:
        from elaswave.runtime import _kernels  # noqa: PLC0415 - whether it is there is the question
    except ImportError:
        return None
    return _kernels


KERNELS: Final = load_kernels()


def address(tensor: Tensor, dtype: torch.dtype, elements: int) -> int:
    """Where a flat host tensor lies. Raises InvariantError where it is not what a kernel would take it for."""
    if tensor.dtype != dtype or tensor.numel() != elements or tensor.is_cuda or not tensor.is_contiguous():
        raise InvariantError(
            f"a kernel is given {tensor.numel()} elements of {tensor.dtype} on {tensor.device}: "
            f"must be {elements} of {dtype}, contiguous, in host memory"
        )
    return tensor.data_ptr()


def addresses(tensors: Sequence[Tensor], dtype: torch.dtype, elements: int) -> list[int]:
    """Of each."""
    return [address(tensor, dtype, elements) for tensor in tensors]
