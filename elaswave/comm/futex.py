"""Waiting for a change of memory, of this process or shared: the system's futex calls. See futex(2), futex_waitv."""

import ctypes
import errno
import platform
from collections.abc import Sequence
from dataclasses import dataclass

_FUTEX = 202  # numbers of system calls of x86-64
_FUTEX_WAITV = 449
_WAIT = 0
_WAKE = 1
_EVERYBODY = 2**31 - 1
_SIZE_U32 = 2
_CLOCK_MONOTONIC = 1
_LOW_BITS = 0xFFFFFFFF

WORDS_LIMIT = 128
"""The system waits for no more words at a time."""

POLL_S = 0.002
"""How often somebody looks at what he cannot wait for: other words than the first, before Linux 5.16."""

AVAILABLE = platform.system() == "Linux" and platform.machine() == "x86_64"
"""Elsewhere links are used: the numbers of the calls differ, or stores may be seen in another order."""

_LIBRARY = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True, slots=True)
class Word:
    """32 bits of memory, and what was found there."""

    address: int
    value: int


class _Timespec(ctypes.Structure):
    _fields_ = (("seconds", ctypes.c_long), ("nanoseconds", ctypes.c_long))


class _Waiter(ctypes.Structure):
    _fields_ = (
        ("value", ctypes.c_uint64),
        ("address", ctypes.c_uint64),
        ("flags", ctypes.c_uint32),
        ("reserved", ctypes.c_uint32),
    )


def wait_while(words: Sequence[Word], now: float, limit_s: float) -> None:
    """Sleep while all words are as they were found, at most `limit_s` seconds from `now` (monotonic); may end early."""
    waiters = (_Waiter * len(words))()
    for waiter, word in zip(waiters, words, strict=True):
        waiter.value, waiter.address, waiter.flags = word.value & _LOW_BITS, word.address, _SIZE_U32
    until = _timespec(now + limit_s)
    failed = _LIBRARY.syscall(
        ctypes.c_long(_FUTEX_WAITV), waiters, len(words), 0, ctypes.byref(until), ctypes.c_int(_CLOCK_MONOTONIC)
    )
    if failed < 0 and ctypes.get_errno() in (errno.ENOSYS, errno.EPERM):  # EPERM: a container's filter does not know it
        _wait_for_one(words[0], min(limit_s, POLL_S))


def _wait_for_one(word: Word, limit_s: float) -> None:
    value, limit = ctypes.c_uint32(word.value & _LOW_BITS), _timespec(limit_s)
    _LIBRARY.syscall(
        ctypes.c_long(_FUTEX), ctypes.c_void_p(word.address), ctypes.c_int(_WAIT), value, ctypes.byref(limit), None, 0
    )


def _timespec(seconds: float) -> _Timespec:
    return _Timespec(int(seconds), int(seconds % 1 * 1e9))


def wake(address: int) -> None:
    """Wake all that wait at `address`, in any process."""
    count = ctypes.c_int(_EVERYBODY)
    _LIBRARY.syscall(ctypes.c_long(_FUTEX), ctypes.c_void_p(address), ctypes.c_int(_WAKE), count, None, None, 0)


class Bell:
    """A word of this process that any of its threads can change."""

    def __init__(self) -> None:
        self._memory = ctypes.c_uint32(0)
        self._address = ctypes.addressof(self._memory)

    def word(self) -> Word:
        """As it is now."""
        return Word(self._address, self._memory.value)

    def ring(self) -> None:
        """Wake whoever waits for it to change. Of two threads that do so at once both may write the same."""
        self._memory.value += 1
        wake(self._address)
