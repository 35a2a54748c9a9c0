"""Keep memory that is freed and soon needed again, such as activations and batches of images."""

from __future__ import annotations

import ctypes
from functools import cache

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of glibc's mallopt
_LARGEST_KEPT = 1 << 30  # bytes of one tensor
_MOST_KEPT = (1 << 31) - 1  # bytes at the end of the heap


@cache
def keep_freed_memory() -> bool:
    """Let the C library keep large freed blocks, because the next batch needs them again.

    By default glibc returns each freed tensor of more than 32 MiB to the system, and the kernel fills the
    next one with zeros, page by page. This takes a sixth of the time of evaluating a ViT on a CPU. The
    process keeps no more memory than it has used before. Calling it again does nothing.

    Returns:
        Whether there is a glibc that takes these settings; without one nothing changes.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):  # another C library
        return False
    # both are needed: setting one of them stops glibc from adapting the other
    return bool(mallopt(_MMAP_THRESHOLD, _LARGEST_KEPT) and mallopt(_TRIM_THRESHOLD, _MOST_KEPT))
