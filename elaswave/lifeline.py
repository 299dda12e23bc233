"""Ties the life of a process to its parent's, whatever ends the parent."""

import ctypes
import os
import signal

from elaswave.errors import FaultError

_PR_SET_PDEATHSIG = 1


def end_with_parent(parent_pid: int) -> None:
    """Have the kernel SIGKILL this process when the thread that made it ends; survives exec.

    `parent_pid` is the parent as the parent itself knows it. The signal follows the parent's *thread*: start processes
    from a thread that lives as long as the parent. Raises FaultError where the parent is gone already or the kernel
    refuses.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0) != 0:
        raise FaultError(f"prctl(PR_SET_PDEATHSIG) failed: {os.strerror(ctypes.get_errno())}; a Linux kernel is needed")
    # The parent may have ended before the call above, and then no signal will ever come.
    if os.getppid() != parent_pid:
        raise FaultError(f"parent process {parent_pid} is gone: process {os.getpid()} must not outlive it")
