"""How contributions of micro-batches are added up: docs/numerics.md.

exact64: a contribution is rounded to multiples of the quantum q = 2^e and added in float64. Sums of multiples of q are
exact while they stay within 2^53 q, hence any order and grouping gives the same bits. To stay within, an element of a
contribution beyond `limit` = min(2^51, 2^53 / M) q is replaced by the limit with its sign, and counted; an infinite or
undefined element becomes NaN, in the sum too. Both depend on that contribution alone.
"""

from collections.abc import Callable, Sequence
from typing import Final, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from elaswave.errors import InvariantError
from elaswave.job import Job
from elaswave.runtime.contribution import BlockGradient, whole
from elaswave.runtime.host_memory import HostMemory, plain_memory
from elaswave.runtime.kernels import KERNELS, PLAIN_SUM, Kernels, address, addresses

PIECE_ELEMENTS: Final = 65536
"""Elements per pass: 1.3 MB of source, scratch and sum. Pieces of 8192 fit a level-2 cache of 512 KiB, but took 0.9 to
2.2 times as long (six pairs of runs), for their calls."""

_MANTISSA: Final = 53


class Accumulation(Protocol):
    """Number type of sums, the way a contribution enters them, and the way they are combined. One per thread."""

    @property
    def dtype(self) -> torch.dtype:
        """Element type of accumulators and partial sums."""

    @property
    def saturated(self) -> int:
        """Elements replaced by the limit so far, on this worker."""

    def zeros(self, elements: int) -> Tensor:
        """A new accumulator: flat, on the host."""

    def empty(self, elements: int) -> Tensor:
        """The same, its values not set: the first contribution is entered as such."""

    def enter(self, accumulator: Tensor, contribution: BlockGradient, *, first: bool) -> None:
        """Add a float32 or bfloat16 contribution of the same length, or make the accumulator hold just this one."""

    def combine(self, parts: Sequence[Tensor]) -> Tensor:
        """Sum of accumulators, or of equal slices of them; a new tensor. `parts` is not empty."""

    def to_gradient(self, parts: Sequence[Tensor], micro_batches: int) -> Tensor:
        """Mean over the micro-batches as float32, each element rounded once from the sum of all parts (not empty)."""


def accumulation_of(job: Job, memory: HostMemory = plain_memory) -> Accumulation:
    """What the job asks for, with accumulators and gradients in `memory`."""
    if job.accumulation == "float32":
        return Float32Accumulation(memory)
    return Exact64Accumulation(quantum_exponent=job.quantum_exponent, micro_batches=job.micro_batches, memory=memory)


class Exact64Accumulation:
    """Sums that do not depend on order, grouping or number of workers."""

    def __init__(
        self,
        *,
        quantum_exponent: int,
        micro_batches: int,
        memory: HostMemory = plain_memory,
        kernels: Kernels | None = KERNELS,
    ) -> None:
        """Raises nothing; `micro_batches` (M) is the most contributions that one sum will have."""
        self._memory = memory
        self._kernels = kernels
        self.limit: Final = 2.0**quantum_exponent * min(2 ** (_MANTISSA - 2), 2**_MANTISSA // micro_batches)
        # Adding 1.5 * 2^52 q leaves no room for bits below q; subtracting it again is exact.
        self._rounder: Final = np.array(1.5 * 2.0 ** (_MANTISSA - 1 + quantum_exponent))
        # Half of it covers the rounding errors of the sum.
        self._square_limit: Final = self.limit**2 / 2
        self._bound: Final = _float32_not_above(self.limit)
        self._scratch: Final[NDArray[np.float64]] = np.empty(PIECE_ELEMENTS)
        self._widened: Final = torch.empty(PIECE_ELEMENTS)
        self._saturated = 0

    @property
    def dtype(self) -> torch.dtype:
        return torch.float64

    @property
    def saturated(self) -> int:
        return self._saturated

    def zeros(self, elements: int) -> Tensor:
        return torch.zeros(elements, dtype=torch.float64)

    def empty(self, elements: int) -> Tensor:
        return self._memory(elements, torch.float64)

    def enter(self, accumulator: Tensor, contribution: BlockGradient, *, first: bool) -> None:
        _check_lengths(accumulator, contribution)
        if self._kernels is None:
            _enter_parts(accumulator, contribution, self._begin if first else self._add, first=first)
            return
        total, gradient = address(accumulator, torch.float64, contribution.elements), contribution.packed
        self._saturated += self._kernels.accumulate(total, gradient, first, float(self._rounder), self._bound)

    def _begin(self, accumulator: Tensor, contribution: Tensor) -> None:
        total = accumulator.numpy()
        for start in range(0, contribution.numel(), PIECE_ELEMENTS):
            piece = self._in_range(contribution[start : start + PIECE_ELEMENTS])
            into = total[start : start + PIECE_ELEMENTS]
            np.copyto(into, piece)
            np.add(into, self._rounder, into)
            np.subtract(into, self._rounder, into)

    def _add(self, accumulator: Tensor, contribution: Tensor) -> None:
        total = accumulator.numpy()
        for start in range(0, contribution.numel(), PIECE_ELEMENTS):
            piece = self._in_range(contribution[start : start + PIECE_ELEMENTS])
            into = total[start : start + PIECE_ELEMENTS]
            rounded = self._scratch[: piece.size]
            # numpy: its calls and its conversion to float64 cost less than torch's.
            np.copyto(rounded, piece)
            np.add(rounded, self._rounder, rounded)
            np.subtract(rounded, self._rounder, rounded)
            np.add(into, rounded, into)

    def combine(self, parts: Sequence[Tensor]) -> Tensor:
        return _sum(parts)

    def to_gradient(self, parts: Sequence[Tensor], micro_batches: int) -> Tensor:
        return _mean(parts, micro_batches, self._memory, self._kernels)

    def quantised(self, contribution: Tensor) -> Tensor:
        """What a flat contribution adds, as float64: for tests and reports."""
        accumulator = self.zeros(contribution.numel())
        self.enter(accumulator, whole(contribution), first=True)
        return accumulator

    def _in_range(self, piece: Tensor) -> NDArray[np.float32]:
        """The elements as float32 within the limit, or NaN."""
        if piece.dtype != torch.float32:
            piece = self._widened[: piece.numel()].copy_(piece)
        # One pass, no copy: where the squares add up to less than the limit's, no element is beyond it. NaN fails too.
        if float(torch.dot(piece, piece)) < self._square_limit:
            return piece.numpy()
        return self._saturate(piece).numpy()

    def _saturate(self, piece: Tensor) -> Tensor:
        finite = torch.isfinite(piece)
        self._saturated += int((finite & (piece.abs() > self._bound)).sum())
        return piece.clamp(-self._bound, self._bound).where(finite, torch.nan)


class Float32Accumulation:
    """Plain sums: half the memory and traffic, but other bits for every order and grouping."""

    def __init__(self, memory: HostMemory = plain_memory, *, kernels: Kernels | None = KERNELS) -> None:
        self._memory = memory
        self._kernels = kernels

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32

    @property
    def saturated(self) -> int:
        return 0

    def zeros(self, elements: int) -> Tensor:
        return torch.zeros(elements)

    def empty(self, elements: int) -> Tensor:
        return self._memory(elements, torch.float32)

    def enter(self, accumulator: Tensor, contribution: BlockGradient, *, first: bool) -> None:
        _check_lengths(accumulator, contribution)
        if self._kernels is None:
            _enter_parts(accumulator, contribution, _begin_plain if first else Tensor.add_, first=first)
            return
        total, gradient = address(accumulator, torch.float32, contribution.elements), contribution.packed
        self._kernels.accumulate(total, gradient, first, 0.0, PLAIN_SUM)

    def combine(self, parts: Sequence[Tensor]) -> Tensor:
        return _sum(parts)

    def to_gradient(self, parts: Sequence[Tensor], micro_batches: int) -> Tensor:
        return _mean(parts, micro_batches, self._memory, self._kernels)


def _float32_not_above(value: float) -> float:
    nearest = np.float32(value)
    return float(nearest if float(nearest) <= value else np.nextafter(nearest, np.float32(0)))


def _begin_plain(accumulator: Tensor, contribution: Tensor) -> None:
    # Not a copy: zero plus minus zero is zero, as it is where an accumulator begins with zeros.
    torch.add(contribution.to(torch.float32), 0.0, out=accumulator)


def _enter_parts(
    accumulator: Tensor, contribution: BlockGradient, enter: Callable[[Tensor, Tensor], object], *, first: bool
) -> None:
    spans = contribution.spans
    if first and (None in contribution.values or sum(spans.lengths) < contribution.elements):
        accumulator.zero_()
    for start, length, values in zip(spans.starts, spans.lengths, contribution.values, strict=True):
        if values is not None:
            enter(accumulator[start : start + length], values.reshape(-1))


def _check_lengths(accumulator: Tensor, contribution: BlockGradient) -> None:
    if accumulator.shape != (contribution.elements,):
        raise InvariantError(
            f"a contribution of {contribution.elements} elements is added to a sum of {tuple(accumulator.shape)}"
        )


def _sum(parts: Sequence[Tensor]) -> Tensor:
    total = parts[0].clone()
    for part in parts[1:]:
        _check_part(total, part)
        total.add_(part)
    return total


def _mean(parts: Sequence[Tensor], micro_batches: int, memory: HostMemory, kernels: Kernels | None) -> Tensor:
    """In pieces that stay in the cache from the first part to the rounding."""
    first = parts[0]
    for part in parts[1:]:
        _check_part(first, part)
    gradient = memory(first.numel(), torch.float32)
    if kernels is not None:
        sources = addresses(parts, first.dtype, first.numel())
        wide = first.dtype is torch.float64
        kernels.mean(gradient.data_ptr(), sources, first.numel(), float(micro_batches), wide)
        return gradient
    scratch = torch.empty(min(PIECE_ELEMENTS, first.numel()), dtype=first.dtype)
    for start in range(0, first.numel(), PIECE_ELEMENTS):
        where = slice(start, start + PIECE_ELEMENTS)
        total = first[where]
        mean = scratch[: total.numel()]
        for part in parts[1:]:
            total = torch.add(total, part[where], out=mean)
        gradient[where].copy_(torch.div(total, micro_batches, out=mean))
    return gradient


def _check_part(first: Tensor, part: Tensor) -> None:
    if part.shape != first.shape:
        raise InvariantError(f"a sum of shape {tuple(part.shape)} is added to one of {tuple(first.shape)}")
