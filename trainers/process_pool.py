"""A pool of processes that end together with their parent."""

from __future__ import annotations

import os
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context, parent_process
from threading import Thread


def process_pool(processes: int) -> ProcessPoolExecutor:
    """Start a pool of spawned processes, which end as soon as this process does, even if it is killed.

    Processes of the standard library's pool would wait for work for ever, because each of them keeps the
    pipes of the others open.
    """
    return ProcessPoolExecutor(processes, mp_context=get_context("spawn"), initializer=_end_with_parent)


def _end_with_parent() -> None:
    Thread(target=_wait_for_end, daemon=True).start()


def _wait_for_end() -> None:
    parent = parent_process()
    assert parent is not None, "only spawned processes run this"
    parent.join()
    os._exit(1)
