"""Memory of this process that is freed and needed again at once: activations and batches of images."""

from __future__ import annotations

import ctypes
from functools import cache

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of glibc's mallopt
_LARGEST_KEPT = 1 << 30  # bytes of one tensor
_MOST_KEPT = (1 << 31) - 1  # bytes at the end of the heap


@cache
def keep_freed_memory() -> bool:
    """Have the C library keep large blocks that are freed, as the next batch needs them again.

    glibc gives each tensor of more than 32 MiB back to the system when it is freed, and the kernel fills the
    next one with zeros, page by page: a sixth of the time of a ViT that is evaluated on a CPU. What is kept
    is no more than what the process had in use before. Calling it again does nothing.

    Returns:
        Whether there is a glibc that takes these settings; without one nothing changes.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):  # another C library
        return False
    # each of the two alone would only keep glibc from raising the other by itself
    return bool(mallopt(_MMAP_THRESHOLD, _LARGEST_KEPT) and mallopt(_TRIM_THRESHOLD, _MOST_KEPT))
