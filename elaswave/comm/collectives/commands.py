"""What a collective asks of whoever drives it."""

from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import NamedTuple, cast

from torch import Tensor

from elaswave.comm.futex import Word


class Send(NamedTuple):
    """Send a flat contiguous tensor to a rank. It must not change before the collective ends on that rank."""

    rank: int
    tensor: Tensor


class Receive(NamedTuple):
    """Take the next tensor that this rank has sent in this collective; `like` has its dtype and length."""

    rank: int
    like: Tensor


class Placed(NamedTuple):
    """`received` was copied to `place`, a part of the result: who keeps the result may keep `received` for it."""

    place: Tensor
    received: Tensor


@dataclass(frozen=True, slots=True)
class Held:
    """From here on this rank has its result, whatever becomes of the others: only acknowledgements follow."""


class Await(NamedTuple):
    """Go on once `is_ready()`, which the rank makes so: `word()` changes before or when it gets so, and wakes."""

    rank: int
    is_ready: Callable[[], bool]
    word: Callable[[], Word]


Command = Send | Receive | Placed | Held | Await

Collective = Generator[Command, Tensor, None]
"""The driver answers a Receive with a tensor that nobody else uses, and the others with `NO_ANSWER`."""

NO_ANSWER = cast(Tensor, None)
"""What a generator takes at its start, and after what has no answer."""
