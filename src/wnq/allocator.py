"""What the C library does with memory that PyTorch gives back on the CPU."""

import ctypes
import sys

_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX = -1, -2, -4
"""Parameters of ``mallopt`` in glibc's ``malloc.h``."""


def keep_freed_memory() -> bool:
    """Keep freed memory in the process instead of returning it to the operating system, and say whether that was possible.

    A training step frees and asks for the same activations over and over. glibc returns large blocks at once, and each of their
    pages must be mapped and cleared anew at its next use (see ``docs/speed.md``). For the whole process, for good, and only with
    glibc (Linux); its environment variables ``MALLOC_MMAP_MAX_=0`` and ``MALLOC_TRIM_THRESHOLD_=-1`` do the same.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except AttributeError:  # another C library
        return False
    return all(
        mallopt(which, value) == 1 for which, value in ((_MMAP_MAX, 0), (_TRIM_THRESHOLD, -1), (_TOP_PAD, 1 << 26))
    )
