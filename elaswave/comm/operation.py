"""Operation: one collective under way on one rank, and what becomes of it."""

from collections.abc import Callable

from torch import Tensor

from elaswave.comm.collectives.commands import Await, Collective, Placed, Receive
from elaswave.errors import ElasWaveError

Callback = Callable[["Operation"], None]


class Operation:
    """State of a collective. The endpoint drives it under its lock; `finished` is set last, for any thread to read."""

    __slots__ = (
        "awaited",
        "before_end",
        "callbacks",
        "catch_up",
        "collective",
        "deadline",
        "error",
        "finished",
        "held",
        "keep",
        "name",
        "number",
        "placed",
        "result",
    )

    def __init__(
        self, name: str, collective: Collective, deadline: float, result: Tensor | None, *, keep: bool
    ) -> None:
        """result: what all ranks share of it afterwards, flat. keep: it is small; it is kept for who misses it."""
        self.name = name
        self.collective = collective
        self.deadline = deadline
        self.result = result
        self.keep = keep
        self.number = -1
        self.held = False
        self.placed: list[Placed] = []  # parts of the result to be kept that are here apart from it
        self.awaited: Receive | Await | None = None
        self.error: ElasWaveError | None = None
        self.finished = False
        self.before_end: Callback | None = None
        self.catch_up: Callable[[], None] | None = None  # gets the result that another rank has completed
        self.callbacks: list[Callback] = []

    def raise_error(self) -> None:
        """Raise what it failed with, if it did."""
        if self.error is not None:
            raise self.error
