"""Alarm: a file descriptor that becomes readable a set time later (timerfd, which Python has from 3.13 on only)."""

import ctypes
import os
import time
from contextlib import suppress

_NANOSECONDS = 1_000_000_000


class Alarm:
    """A timer to wait for by epoll. Setting it again replaces the time; setting it wakes nobody until it is over.

    It goes through the C library that the interpreter has loaded; a call takes about a microsecond and keeps the GIL,
    as it never waits.
    """

    def __init__(self, delay_s: float) -> None:
        self._fd = -1
        seconds, rest = divmod(int(delay_s * _NANOSECONDS), _NANOSECONDS)
        self._delay = (ctypes.c_long * 4)(0, 0, seconds, rest)  # struct itimerspec: interval, then first time
        libc = ctypes.PyDLL(None, use_errno=True)
        self._create = libc.timerfd_create
        self._settime = libc.timerfd_settime
        self._settime.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p)

    def open(self) -> int:
        """Make the descriptor; returns it."""
        self._fd = self._create(time.CLOCK_MONOTONIC, os.O_NONBLOCK | os.O_CLOEXEC)
        if self._fd < 0:
            error = ctypes.get_errno()
            raise OSError(error, f"timerfd_create: {os.strerror(error)}")
        return self._fd

    def set(self) -> None:
        """Become readable once the delay from now is over."""
        if self._settime(self._fd, 0, self._delay, None):
            error = ctypes.get_errno()
            raise OSError(error, f"timerfd_settime: {os.strerror(error)}")

    def clear(self) -> None:
        """Be no longer readable."""
        with suppress(BlockingIOError):
            os.read(self._fd, 8)

    def close(self) -> None:
        """Close the descriptor."""
        os.close(self._fd)
