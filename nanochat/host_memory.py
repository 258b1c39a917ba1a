"""Memory that a CPU's step frees is kept for the next step, instead of being given back to the kernel each time.

glibc maps every block of 32 MB or more afresh (smaller ones too, at first) and gives back the end of its heap whenever
enough of it is free. The next step's blocks are new pages then, which the kernel zeroes one by one, 4 kB each, as they
are first touched, while the other threads wait. Kept, the heap stays about as large as it was at its fullest.
`python -m benchmarks.neighbour --ways ours,given-back` measures what that is worth. (Source: mallopt(3).)
"""

import ctypes
import os
import sys

# By which the user may have decided.
VARIABLES = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_MAX_", "MALLOC_TOP_PAD_")
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # names of malloc.h
NEVER = -1
LARGEST = (1 << 30, 32 << 20)  # bytes; a larger block has pages of its own. Old glibc refuses the first


def keep() -> None:
    """From now on. Nothing where the user has set any of it, or where malloc is not glibc's."""
    tuned = "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", "")
    if sys.platform != "linux" or tuned or any(name in os.environ for name in VARIABLES):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    # Either ends glibc's own adapting, so that the first must have been taken (1) before the second is set.
    if mallopt is not None and any(mallopt(M_MMAP_THRESHOLD, size) for size in LARGEST):
        mallopt(M_TRIM_THRESHOLD, NEVER)
