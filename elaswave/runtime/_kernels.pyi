import torch
from torch import Tensor

def accumulate(
    total: int,
    elements: int,
    spans: bytes,
    values: tuple[Tensor | None, ...],
    dtype: torch.dtype,
    bfloat16: bool,
    begin: bool,
    rounder: float = ...,
    bound: float = ...,
    /,
) -> int: ...
def mean(into: int, parts: list[int], elements: int, divisor: float, wide: bool, /) -> None: ...
def adamw(
    master: int, average: int, square_average: int, gradient: int, elements: int, constants: bytes, /
) -> None: ...
def finite(address: int, elements: int, bfloat16: bool, /) -> bool: ...
