"""Threads for the compiled loops, which hold no interpreter lock: as many as torch uses."""

from __future__ import annotations

import functools
import itertools
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch

_THREADS = "espalier-kernel"


def supports(*tensors: torch.Tensor) -> bool:
    """Return whether the compiled loops can work on some tensors: all must be in the CPU's memory."""
    return all(tensor.device.type == "cpu" for tensor in tensors)


def on_threads(work: Callable[[slice], object], count: int) -> None:
    """Divide ``range(count)`` into parts, and work on each part in a thread of its own.

    There are as many threads as torch uses. A call from one of these threads works in that thread alone.

    Args:
        work: is called with each part, a slice; it must release the interpreter lock to gain speed.
        count: number of items, as blocks or layers.
    """
    nested = threading.current_thread().name.startswith(_THREADS)
    threads = 1 if nested else max(1, min(torch.get_num_threads(), count))
    cuts = [count * part // threads for part in range(threads + 1)]
    parts = [slice(first, last) for first, last in itertools.pairwise(cuts) if last > first]
    if len(parts) < 2:
        for part in parts:
            work(part)
        return
    for future in [_pool().submit(work, part) for part in parts]:
        future.result()


@functools.cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(os.cpu_count(), thread_name_prefix=_THREADS)


# A forked process inherits the pool object, but not its threads.
os.register_at_fork(after_in_child=_pool.cache_clear)
