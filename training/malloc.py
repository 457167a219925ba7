"""Freed memory on CPUs: kept between the passes of a step, given back where it has gone to pieces (glibc's malloc)."""

import ctypes
import sys


# Of malloc.h. The values are its largest: blocks above are mappings of their own, free memory above at the heap's end
# goes back to the system at once. Both start far lower, and every pass would be given its pages anew.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
TRIM_BYTES, MMAP_BYTES = 2**31 - 1, 2**25


def _glibc():
    library = ctypes.CDLL(None) if sys.platform == "linux" else None
    return library if hasattr(library, "malloc_trim") else None


def keep_freed_memory():
    """Let this process keep what it frees for what it takes next: a seventh of a pass of gve-mini is page faults."""
    if (library := _glibc()) is not None:
        library.mallopt(M_MMAP_THRESHOLD, MMAP_BYTES)
        library.mallopt(M_TRIM_THRESHOLD, TRIM_BYTES)


def return_freed_memory():
    """Give what is kept of freed memory back to the system."""
    if (library := _glibc()) is not None:
        library.malloc_trim(0)
