"""Scheduling priorities, where the system permits them: who must answer at once, and who can wait.

With 8 busy workers on 2 cores, benchmarks/recovery.py gave 63 ms from a kill to the lost work being done elsewhere; 37
ms passed until the agent knew: a woken process waits its turn for a processor like all others. A worker that starts
again beside others that train takes a processor for some tenths of a second, just when they have lost one of theirs.
"""

import os
from contextlib import suppress
from typing import Final

URGENT_NICE: Final = -10
PATIENT_NICE: Final = 10


def be_urgent() -> None:
    """Go before workers on a full machine. Without the privilege (CAP_SYS_NICE) nothing changes."""
    with suppress(PermissionError):
        os.setpriority(os.PRIO_PROCESS, 0, URGENT_NICE)


def be_patient() -> None:
    """Go behind workers that train, until `be_ordinary`. For the first thread of a process.

    Nothing changes where that could not be undone, nor in a job that was started with another priority.
    """
    if os.getpriority(os.PRIO_PROCESS, 0) != 0:
        return
    with suppress(PermissionError):
        os.setpriority(os.PRIO_PROCESS, 0, -1)  # as much of a privilege as the way back will be
        os.setpriority(os.PRIO_PROCESS, 0, PATIENT_NICE)


def be_ordinary() -> None:
    """Undo the others, or what an urgent parent left; a job that was started with another priority keeps it."""
    for thread in os.listdir("/proc/self/task"):
        with suppress(ProcessLookupError):  # it has ended meanwhile
            if os.getpriority(os.PRIO_PROCESS, int(thread)) in (URGENT_NICE, PATIENT_NICE):
                os.setpriority(os.PRIO_PROCESS, int(thread), 0)
