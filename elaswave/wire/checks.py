"""Checks of what came over a wire. Each returns the value, or raises ProtocolError that names the field."""

import math
import reprlib
from collections.abc import Sequence, Sized

from elaswave.errors import ProtocolError

MAX_LAYERS = 1 << 16
MAX_MICRO_BATCHES = 1 << 16
MAX_ENTRIES = 1 << 20
"""Limit of every other repeated field: members, shards, hops, held versions."""
MAX_STEP = 2**63 - 1
MAX_NAME = 1 << 10
"""Limit in characters of names, addresses, digests and paths."""
MAX_TEXT = 1 << 16
"""Limit in characters of messages and lines; senders cut theirs."""
MAX_TRACEBACK = 1 << 18
MAX_MANIFEST = 1 << 24


def refuse(field: str, value: object, wanted: str) -> ProtocolError:
    """The error for a field whose value is not as wanted."""
    return ProtocolError(f"{field} is {reprlib.repr(value)}: it must be {wanted}; the message is refused")


def number(field: str, value: int, low: int, high: int) -> int:
    """`value` where low <= value <= high."""
    if not low <= value <= high:
        raise refuse(field, value, f"from {low} to {high}")
    return value


def finite(field: str, value: float) -> float:
    """`value` where it is neither infinite nor NaN."""
    if not math.isfinite(value):
        raise refuse(field, value, "finite")
    return value


def one_of(field: str, value: str, allowed: Sequence[str]) -> str:
    """`value` where it is one of `allowed`."""
    if value not in allowed:
        raise refuse(field, value, f"one of {', '.join(map(repr, allowed))}")
    return value


def text(field: str, value: str, limit: int) -> str:
    """`value` where it has at most `limit` characters."""
    if len(value) > limit:
        raise refuse(f"the length of {field}", len(value), f"at most {limit}")
    return value


def name(field: str, value: str) -> str:
    """`value` where it is not empty and no longer than a name."""
    if not value:
        raise refuse(field, value, "given")
    return text(field, value, MAX_NAME)


def entries(field: str, values: Sized, limit: int = MAX_ENTRIES) -> None:
    """Refuses more than `limit` values."""
    if len(values) > limit:
        raise refuse(f"the number of {field}", len(values), f"at most {limit}")


def distinct(field: str, values: Sequence[int]) -> None:
    """Refuses a value that stands twice."""
    if len(set(values)) != len(values):
        raise refuse(field, list(values), "without repetition")


def sendable(value: str, limit: int, *, keep_end: bool = False) -> str:
    """`value` cut to `limit` characters, lone surrogates replaced, so that any text of a user can be sent."""
    cut = value[-limit:] if keep_end else value[:limit]
    return cut.encode("utf-8", "replace").decode("utf-8")
