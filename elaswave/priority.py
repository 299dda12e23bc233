"""Scheduling priority of the processes that must answer at once: agent and controller, where the system permits it.

Measured on 2 cores with 8 busy workers: most of the time from a worker's death to its agent knowing is the agent's wait
for a processor (docs/architecture.md). They use about a hundredth of one.
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
