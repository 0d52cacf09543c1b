"""The C library's heap, told to keep what it has.

By default glibc gives freed memory of some megabytes back to the system, or does not, by how the heap happens to lie;
then every step of a training loop faults its tensors in anew. One process of two that did the same was seen to take
eight times as long for it.
"""

import contextlib
import ctypes
import sys

TRIM, MAP = -1, -3  # M_TRIM_THRESHOLD and M_MMAP_THRESHOLD of malloc.h
KEPT_BYTES = 512 * 2**20  # freed memory at the heap's end that stays with the process
MAPPED_BYTES = 32 * 2**20  # glibc's limit: larger blocks are always mapped and unmapped


def keep() -> None:
    """Lets this process keep freed memory for its next tensors; does nothing where the C library is another."""
    if sys.platform == "linux":
        with contextlib.suppress(AttributeError, OSError):
            libc = ctypes.CDLL(None)
            libc.mallopt(TRIM, KEPT_BYTES)
            libc.mallopt(MAP, MAPPED_BYTES)
