"""Optimizer state of one shard: master values and moments in one buffer that can be sent as it is."""

import torch
from torch import Tensor

from elaswave.errors import InvariantError, ProtocolError
from elaswave.job import AdamW, Optimizer

_FLOAT32_BYTES = 4


def state_rows(optimizer: Optimizer) -> int:
    """Float32 values per parameter: the master value and the moments of the optimizer."""
    if isinstance(optimizer, AdamW):
        return 3
    return 2 if optimizer.momentum else 1


def state_bytes(optimizer: Optimizer, elements: int) -> int:
    """Length of the serialised state of a shard with `elements` elements."""
    return state_rows(optimizer) * elements * _FLOAT32_BYTES


class ShardState:
    """Master values and moments of one shard, float32, each (elements,); updated in place.

    AdamW: moments are (exp_avg, exp_avg_sq). SGD: (momentum buffer,), or none without momentum.
    """

    __slots__ = ("_rows", "master", "moments")

    def __init__(self, rows: Tensor) -> None:
        """`rows`: float32 of shape (1 + moments, elements), contiguous; the state takes it over."""
        self._rows = rows
        self.master: Tensor = rows[0]
        self.moments: tuple[Tensor, ...] = tuple(rows[1:])

    @property
    def elements(self) -> int:
        """Parameters in the shard."""
        return self.master.numel()

    def serialised(self) -> Tensor:
        """The state as uint8, little-endian, row after row: a view that the next update changes."""
        return self._rows.view(-1).view(torch.uint8)

    def copy(self) -> "ShardState":
        """The same values in memory of its own."""
        return ShardState(self._rows.clone())


def initial_state(optimizer: Optimizer, values: Tensor) -> ShardState:
    """State at version 0: a copy of the float32 initial values, moments zero."""
    rows = torch.zeros(state_rows(optimizer), values.numel())
    rows[0].copy_(values)
    return ShardState(rows)


def state_from_bytes(optimizer: Optimizer, elements: int, payload: Tensor) -> ShardState:
    """State from received bytes (flat uint8, host), copied. Raises ProtocolError where the length is not right."""
    expected = state_bytes(optimizer, elements)
    if payload.dtype != torch.uint8 or payload.numel() != expected:
        raise ProtocolError(
            f"state of a shard of {elements} elements has {payload.numel()} elements of {payload.dtype}: "
            f"must be {expected} bytes"
        )
    rows = torch.empty(state_rows(optimizer), elements)
    rows.view(-1).view(torch.uint8).copy_(payload)
    return ShardState(rows)


def parameters_of(state: ShardState, dtype: torch.dtype) -> Tensor:
    """Parameters as they are published, flat, in the model's parameter type, each rounded once from its master value.

    For float32 the master values themselves, without a copy: valid until the next update.
    """
    if dtype == torch.float32:
        return state.master
    return state.master.to(dtype)


def check_gradient(state: ShardState, gradient: Tensor) -> None:
    """Raises InvariantError where a gradient cannot be one of this shard."""
    if gradient.shape != state.master.shape or gradient.dtype != torch.float32:
        raise InvariantError(
            f"gradient has {tuple(gradient.shape)} elements of {gradient.dtype}, "
            f"its shard {tuple(state.master.shape)} of torch.float32"
        )
