"""How elements are combined, and how a flat tensor is divided among ranks."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Combine = Callable[[Tensor, Tensor], object]
"""Changes the first tensor into the combination of both; same dtype and length. Commutative, not always associative."""


def add(into: Tensor, other: Tensor) -> None:
    """Sum."""
    into.add_(other)


def maximum(into: Tensor, other: Tensor) -> None:
    """Greater of both, element by element; NaN stays NaN."""
    torch.maximum(into, other, out=into)


def even_segments(elements: int, count: int) -> tuple[int, ...]:
    """Lengths of `count` segments of `elements` elements that differ by one at most."""
    short, longer = divmod(elements, count)
    return tuple(short + (index < longer) for index in range(count))


def split(tensor: Tensor, lengths: Sequence[int]) -> tuple[Tensor, ...]:
    """Views of a flat tensor."""
    return torch.split(tensor, list(lengths))


def whole_of(tensors: Sequence[Tensor]) -> Tensor:
    """A flat tensor for the elements of all: a view of them, if they lie one after the other in memory, else new."""
    total = sum(tensor.numel() for tensor in tensors)
    filled = [tensor for tensor in tensors if tensor.numel()]
    if not filled:
        return tensors[0].new_empty(0)
    first = filled[0].detach()
    end = first.data_ptr()
    for tensor in filled:
        if not tensor.is_contiguous() or tensor.data_ptr() != end:
            return first.new_empty(total)
        end += tensor.nbytes
    storage = first.untyped_storage()
    if end > storage.data_ptr() + storage.nbytes():
        return first.new_empty(total)
    return first.as_strided((total,), (1,))
