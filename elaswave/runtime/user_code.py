"""Marks calls into the user's code, so that what it raises is reported as the user's."""

import traceback
from collections.abc import Callable
from types import TracebackType

from elaswave.errors import ElasWaveError, UserCodeError


class UserCode:
    """Context in which any exception but ElasWave's own becomes UserCodeError: `what` names who raised.

    A function is asked for the name when something was raised.

    The message is one line; the user's exception, with its traceback, is the cause.
    """

    __slots__ = ("_what",)

    def __init__(self, what: str | Callable[[], str]) -> None:
        self._what = what

    def __enter__(self) -> None:
        return None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(error, Exception) and not isinstance(error, ElasWaveError):
            summary = " ".join("".join(traceback.format_exception_only(error)).split())
            what = self._what if isinstance(self._what, str) else self._what()
            raise UserCodeError(f"{what} raised {summary}") from error
