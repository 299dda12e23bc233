"""Whether the kernel has begun to end a process, long before its pidfd can tell.

A process that gets SIGKILL is on its way to its end at once, but its pidfd becomes readable only when it has had a
processor to end on and its memory is freed: 1.0 to 1.3 s for 4 GiB (benchmarks/detection.py), minutes while a core is
dumped. From the pending SIGKILL on it runs no instruction of its own.

Source: proc_pid_stat(5), fields 9 (flags, as in the kernel's include/linux/sched.h) and 31 (pending signals).
"""

import os
from enum import Enum
from typing import Final, Self

_FLAGS: Final = 9 - 3
"""Fields are counted from 1; what follows the name, which may hold anything but ends with the last ')', from 3."""

_PENDING: Final = 31 - 3
_PF_DUMPCORE: Final = 0x200
_PF_SIGNALED: Final = 0x400
_SIGKILL_PENDING: Final = 1 << (9 - 1)
_READ_BYTES: Final = 2048


class Life(Enum):
    """As far as the kernel tells. DYING: a signal is ending the process, which runs nothing of its own any more."""

    RUNS = "runs"
    DYING = "dying"
    ENDED = "ended"


class ProcessStat:
    """/proc/PID/stat of one process, kept open: it never tells of another process that got the same pid."""

    def __init__(self, descriptor: int) -> None:
        """Takes over the descriptor of the open file."""
        self._descriptor = descriptor

    @classmethod
    def open(cls, pid: int) -> Self:
        """Raises OSError where there is no such process."""
        return cls(os.open(f"/proc/{pid}/stat", os.O_RDONLY | os.O_CLOEXEC))

    def life(self) -> Life:
        """What has become of the process; some 7 us."""
        try:
            return Life.DYING if is_dying(os.pread(self._descriptor, _READ_BYTES, 0)) else Life.RUNS
        except ProcessLookupError:
            return Life.ENDED

    def close(self) -> None:
        """Once."""
        os.close(self._descriptor)


def is_dying(stat: bytes) -> bool:
    """Whether this content of /proc/PID/stat is of a process that a signal is ending.

    Its main thread is told by SIGKILL, whichever signal it was and whichever thread got it. A plain exit of the main
    thread is none: what is left to do then is short, and its exit code is not known yet.
    """
    fields = stat[stat.rindex(b")") + 2 :].split(b" ", _PENDING + 1)
    return bool(int(fields[_FLAGS]) & (_PF_SIGNALED | _PF_DUMPCORE) or int(fields[_PENDING]) & _SIGKILL_PENDING)
