"""Processes of several workers, forked from one that has imported what they need."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.multiprocessing as mp


def start_workers(function: Callable[..., Any], arguments: tuple[Any, ...], world: int) -> None:
    """Call ``function(rank, *arguments)`` in as many processes, and wait until all have ended.

    Raises:
        ProcessRaisedException: one of them failed.
    """
    # a module of tests/support would not be found there: that process has Python's own search path
    mp.get_context("forkserver").set_forkserver_preload(["trainers.loop.gradual"])
    mp.start_processes(function, arguments, nprocs=world, start_method="forkserver")
