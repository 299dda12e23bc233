"""Scheduling priority of the processes that must answer at once: agent and controller, where the system permits it.

With 8 busy workers on 2 cores, benchmarks/recovery.py gave 63 ms from a kill to the lost work being done elsewhere; 37
ms passed until the agent knew: a woken process waits its turn for a processor like all others.
"""

import os
from contextlib import suppress

URGENT_NICE = -10


def be_urgent() -> None:
    """Go before workers on a full machine. Without the privilege (CAP_SYS_NICE) nothing changes."""
    with suppress(PermissionError):
        os.setpriority(os.PRIO_PROCESS, 0, URGENT_NICE)


def be_ordinary() -> None:
    """Undo what was inherited from an urgent parent; a job that was started with a lower priority keeps it."""
    if os.getpriority(os.PRIO_PROCESS, 0) == URGENT_NICE:
        os.setpriority(os.PRIO_PROCESS, 0, 0)
