"""How the C library hands memory back to the system, which costs more than training steps that need it again."""

import ctypes

_M_TRIM_THRESHOLD = -1
_M_TOP_PAD = -2
_M_MMAP_MAX = -4
_KEEP_BYTES = 2**31 - 1
_GROW_BYTES = 64 << 20


def keep_freed_memory() -> None:
    """Have malloc keep what is freed for later use by this process. Does nothing where the C library is not glibc's.

    By default every tensor above a threshold gets fresh pages from the kernel and returns them: in a virtual machine
    float64 temporaries of 6 MB and more made a sum of four operations take up to 17 ns per element instead of 3.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return
    for option, value in ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, _KEEP_BYTES), (_M_TOP_PAD, _GROW_BYTES)):
        mallopt(ctypes.c_int(option), ctypes.c_int(value))
