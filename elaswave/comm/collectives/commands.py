"""What a collective asks of whoever drives it."""

from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import cast

from torch import Tensor

from elaswave.comm.futex import Word


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
class Placed:
    """`received` was copied to `place`, a part of the result: who keeps the result may keep `received` for it."""

    place: Tensor
    received: Tensor


@dataclass(frozen=True, slots=True)
class Held:
    """From here on this rank has its result, whatever becomes of the others: only acknowledgements follow."""


@dataclass(frozen=True, slots=True)
class Await:
    """Go on once `is_ready()`, which the rank makes so: `word()` changes before or when it gets so, and wakes."""

    rank: int
    is_ready: Callable[[], bool]
    word: Callable[[], Word]


Command = Send | Receive | Placed | Held | Await

Collective = Generator[Command, Tensor, None]
"""The driver answers a Receive with a tensor that nobody else uses, and the others with `NO_ANSWER`."""

NO_ANSWER = cast(Tensor, None)
"""What a generator takes at its start, and after what has no answer."""
