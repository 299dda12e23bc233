"""What a collective asks of whoever drives it."""

from collections.abc import Generator
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True)
class Send:
    """Send a flat contiguous tensor to a rank. It must not change before the collective ends on that rank."""

    rank: int
    tensor: Tensor


@dataclass(frozen=True, slots=True)
class Receive:
    """Take the next tensor that this rank has sent in this collective; `like` has its dtype and length."""

    rank: int
    like: Tensor


@dataclass(frozen=True, slots=True)
class Held:
    """From here on this rank has its result, whatever becomes of the others: only acknowledgements follow."""


Collective = Generator[Send | Receive | Held, Tensor, None]
"""The driver answers a Receive with a tensor that nobody else uses, and the others with an empty tensor."""
