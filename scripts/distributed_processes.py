"""Processes that leave nothing behind: each ends with its parent, and those that lose theirs are found and ended."""

import contextlib
import ctypes
import os
import signal

import psutil

# prctl(2): Python has no names for them
_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36
_SWEEP_S = 5.0


def end_with_parent() -> None:
    """Have this process killed when its parent ends, however that ends."""
    parent = os.getppid()
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it ended before it could be watched
        os._exit(1)


def adopt_orphans() -> None:
    """Become the parent of all descendants whose own parent ends, so that `sweep` finds them."""
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)


def sweep() -> None:
    """Kill all descendants of this process and wait for their end."""
    # In rounds: one of them may have started another while the list was made.
    while descendants := psutil.Process().children(recursive=True):
        for process in descendants:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(descendants, timeout=_SWEEP_S)


def _prctl(option: int, value: int) -> None:
    if ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0):
        raise OSError(ctypes.get_errno(), f"prctl({option}) failed")
