"""Processes that work for this one, and end with it."""

from __future__ import annotations

import os
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context, parent_process
from threading import Thread


def process_pool(processes: int) -> ProcessPoolExecutor:
    """Fresh processes, which end at once when this one does, also when it is killed.

    Those of the standard library alone would wait on for work, as each holds the ends of the others' pipes.
    """
    return ProcessPoolExecutor(processes, mp_context=get_context("spawn"), initializer=_end_with_parent)


def _end_with_parent() -> None:
    Thread(target=_wait_for_end, daemon=True).start()


def _wait_for_end() -> None:
    parent = parent_process()
    assert parent is not None, "only what was spawned runs this"
    parent.join()
    os._exit(1)
