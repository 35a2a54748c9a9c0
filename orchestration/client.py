"""From a laptop through Ray's client port (``ray://``): the sweep's driver runs as a task on the cluster.

Tune's callbacks, the display and the tracker all belong to the driver, which must sit where the cluster is;
its lines come back through Ray's own log stream, and Ctrl-C here cancels it there.
"""

from __future__ import annotations

import contextlib
import logging
from typing import Any

import ray
from ray.exceptions import RayTaskError, TaskCancelledError

from pruners.errors import InputError


def run_through_client(recipe: dict[str, Any], *, address: str, recipe_name: str) -> None:
    """Run a recipe's sweep on the cluster behind ``address``.

    Raises:
        InputError: no cluster answers, or the recipe cannot run there.
        KeyboardInterrupt: after the driver on the cluster has been cancelled.
    """
    try:
        ray.init(address=address, logging_level=logging.ERROR, log_to_driver=True)
    except (ConnectionError, RuntimeError, TimeoutError, ValueError, OSError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError("--address", address, f"no Ray cluster could be joined ({reason})") from None
    task = ray.remote(num_cpus=0, max_retries=0)(_drive).remote(recipe, recipe_name)
    try:
        ray.get(task)
    except RayTaskError as error:
        raise error.cause from None
    except KeyboardInterrupt:
        ray.cancel(task)
        with contextlib.suppress(RayTaskError, TaskCancelledError, TimeoutError):
            ray.get(task, timeout=30)
        raise
    finally:
        ray.shutdown()


def _drive(recipe: dict[str, Any], recipe_name: str) -> None:
    """The driver's task: the same steps as on a cluster's head."""
    from rich.console import Console

    from orchestration.checks import prepare
    from orchestration.config import Recipe
    from orchestration.display import Display
    from orchestration.sweep import run_sweep

    console = Console(width=150)
    with Display(console) as display:
        prepared = prepare(Recipe.model_validate(recipe))
        run_sweep(prepared, display, address="auto", recipe_name=recipe_name)
