"""Holds a killed process at the beginning of its end, as its memory does where it has a lot, for as long as needed."""

import ctypes
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

_PTRACE_SEIZE, _PTRACE_DETACH = 0x4206, 17
_PTRACE_O_TRACEEXIT = 0x40
_PTRACE_EVENT_EXIT = 6


@contextmanager
def held_end(pid: int) -> Iterator[Callable[[float], None]]:
    """From the kill of this process to the end of the block, its end is under way. Gives a wait for its begin.

    Use from one thread. Raises PermissionError where this machine forbids to trace.
    """
    _ptrace(_PTRACE_SEIZE, pid, _PTRACE_O_TRACEEXIT)

    def wait(limit_s: float) -> None:
        deadline = time.monotonic() + limit_s
        while True:
            found, status = os.waitpid(pid, os.WNOHANG | 0x40000000)  # __WALL
            if found and status >> 16 == _PTRACE_EVENT_EXIT:
                return
            assert time.monotonic() < deadline, f"process {pid} does not begin to end"

    try:
        yield wait
    finally:
        _ptrace(_PTRACE_DETACH, pid, 0)


def _ptrace(request: int, pid: int, data: int) -> None:
    call = ctypes.CDLL(None, use_errno=True).ptrace
    call.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]
    call.restype = ctypes.c_long
    if call(request, pid, None, data) < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
