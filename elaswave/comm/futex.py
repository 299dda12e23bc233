"""Waiting for a change of shared memory: the system's futex calls. See futex(2)."""

import ctypes
import platform

_SYSTEM_CALL = 202  # of x86-64
_WAIT = 0
_WAKE = 1
_EVERYBODY = 2**31 - 1

AVAILABLE = platform.system() == "Linux" and platform.machine() == "x86_64"
"""Elsewhere links are used: the number of the call differs, or stores may be seen in another order."""

_LIBRARY = ctypes.CDLL(None, use_errno=True)


class _Timespec(ctypes.Structure):
    _fields_ = (("seconds", ctypes.c_long), ("nanoseconds", ctypes.c_long))


def wait_while(address: int, value: int, limit_s: float) -> None:
    """Sleep while the 32 low bits at `address` are those of `value`, at most `limit_s` seconds; may end early."""
    limit = _Timespec(int(limit_s), int(limit_s % 1 * 1e9))
    word = ctypes.c_uint32(value & 0xFFFFFFFF)
    _LIBRARY.syscall(
        ctypes.c_long(_SYSTEM_CALL), ctypes.c_void_p(address), ctypes.c_int(_WAIT), word, ctypes.byref(limit), None, 0
    )


def wake(address: int) -> None:
    """Wake all that wait at `address`, in any process."""
    count = ctypes.c_int(_EVERYBODY)
    _LIBRARY.syscall(ctypes.c_long(_SYSTEM_CALL), ctypes.c_void_p(address), ctypes.c_int(_WAKE), count, None, None, 0)
