"""Where the memory of a process comes from, between one train step and the next."""

import ctypes
import os
import sys

TRIM_THRESHOLD, MMAP_MAX = -1, -4  # of mallopt(3), as glibc's malloc.h numbers them


def keep_freed() -> bool:
    """Has what a step frees stay with this process for the next one, and says whether it does.

    XLA allocates a step's temporaries anew each time. glibc gives blocks of that size back to the kernel, which then
    has to clear every page of them again: of a small model's step that was a third of the time. Kept, they cost no
    more memory than the largest step has needed.

    Nothing changes where the C library is not glibc, or the environment says how its malloc is to work.
    """
    asked = "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", "") or any(n.startswith("MALLOC_") for n in os.environ)
    if sys.platform != "linux" or asked or not hasattr(libc := ctypes.CDLL(None), "gnu_get_libc_version"):
        return False
    # No block is mapped by itself, and none at the end of the heap is given back.
    return bool(libc.mallopt(MMAP_MAX, 0) and libc.mallopt(TRIM_THRESHOLD, -1))
