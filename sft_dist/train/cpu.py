"""What a process must settle before torch is imported to be fast on a CPU, each with its measurement in docs/decisions.md."""

from __future__ import annotations

import ctypes
import os

# mallopt(3) parameters of glibc.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3


def settle_cpu() -> None:
    """Short spinning of waiting threads, and memory that is kept between steps; the user's own settings stand.

    Threads of libgomp that wait for each other spin; with another process on the same cores they spin away each
    other's time. glibc returns freed memory to the system at the end of each step and asks for it again in the next
    one, page by page.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    if "MALLOC_TRIM_THRESHOLD_" in os.environ or "LD_PRELOAD" in os.environ:  # tuned, or another allocator
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:  # not with musl
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
        mallopt(M_MMAP_THRESHOLD, 32 * 2**20)  # the most that glibc takes
