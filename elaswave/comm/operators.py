"""torch.distributed's reduce operators as functions that combine two flat tensors."""

from collections.abc import Callable
from functools import cache

import torch
import torch.distributed as dist
from torch import Tensor

from elaswave.comm.collectives.reduction import Combine, add, maximum
from elaswave.errors import ConfigError


def _in_place(function: Callable[[Tensor, Tensor], Tensor]) -> Combine:
    def combine(into: Tensor, other: Tensor) -> None:
        into.copy_(function(into, other))

    return combine


def combine_of(operator: object, dtype: torch.dtype) -> Combine:
    """Raises ConfigError for an operator that is not known, or not defined for this dtype."""
    # ReduceOp compares with its kinds, but does not hash like them.
    for kind, combine in _KINDS:
        if operator == kind:
            _check(combine, str(operator), dtype)
            return combine
    raise ConfigError(
        f"reduce operator {operator} is not supported: use SUM, AVG, PRODUCT, MIN, MAX, BAND, BOR or BXOR"
    )


@cache
def _check(combine: Combine, name: str, dtype: torch.dtype) -> None:
    """Found out before the operation begins: in the middle of it the other ranks would wait for ever."""
    try:
        combine(torch.empty(1, dtype=dtype), torch.empty(1, dtype=dtype))
    except RuntimeError as error:
        raise ConfigError(f"reduce operator {name} is not defined for {dtype}: {error}") from error


def average_over(operator: object, tensor: Tensor, size: int) -> Callable[[], object] | None:
    """What turns the sum into a mean, where the operator asks for it."""
    if operator != dist.ReduceOp.AVG:
        return None
    tensor = tensor.detach()  # done by another thread, in which gradients may be recorded
    fractions = tensor.is_floating_point() or tensor.is_complex()
    return lambda: tensor.div_(size) if fractions else tensor.copy_(tensor // size)


_KINDS: tuple[tuple[object, Combine], ...] = (
    (dist.ReduceOp.SUM, add),
    (dist.ReduceOp.AVG, add),
    (dist.ReduceOp.MAX, maximum),
    (dist.ReduceOp.MIN, _in_place(torch.minimum)),
    (dist.ReduceOp.PRODUCT, _in_place(torch.mul)),
    (dist.ReduceOp.BAND, _in_place(torch.bitwise_and)),
    (dist.ReduceOp.BOR, _in_place(torch.bitwise_or)),
    (dist.ReduceOp.BXOR, _in_place(torch.bitwise_xor)),
)
