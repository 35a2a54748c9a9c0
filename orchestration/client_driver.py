"""The driver of a sweep as a task on the cluster, started from a laptop through Ray's client port.

Tune's callbacks, the display and the tracker belong to the driver, which must run on the cluster. The lines
that it prints come back through a queue, and Ctrl-C here cancels it there.
"""

from __future__ import annotations

import contextlib
import io
import sys
from typing import IO, TYPE_CHECKING, Any, cast

import ray
from ray.exceptions import RayError, RayTaskError
from ray.util.queue import Queue

from orchestration.cluster.connect import joined
from orchestration.recipe.phases import PhaseRange

if TYPE_CHECKING:
    from orchestration.recipe.schema import Recipe

_POLL_SECONDS = 0.5
_CANCEL_SECONDS = 30


def run_through_client(recipe: Recipe, *, address: str, recipe_name: str, phase_range: PhaseRange) -> None:
    """Run a recipe's sweep on the cluster behind ``address``.

    Args:
        recipe: the recipe, read and typed.
        address: ``ray://HOST:10001``.
        recipe_name: as the user gave it.
        phase_range: the phases to run.

    Raises:
        InputError: no cluster answers, or the recipe cannot run there.
        KeyboardInterrupt: after the driver on the cluster has been cancelled.
    """
    with joined(address):
        lines = Queue(actor_options={"num_cpus": 0})
        task = ray.remote(num_cpus=0, max_retries=0)(_drive).remote(recipe, recipe_name, phase_range, lines)
        try:
            done: list[Any] = []
            while not done:
                done, _ = ray.wait([task], timeout=_POLL_SECONDS)
                _print_waiting(lines)
            ray.get(task)
        except RayTaskError as error:
            raise error.cause from None
        except KeyboardInterrupt:
            ray.cancel(task)
            with contextlib.suppress(RayError, TimeoutError):
                ray.get(task, timeout=_CANCEL_SECONDS)
            raise


def _print_waiting(lines: Queue) -> None:
    while (waiting := lines.qsize()) > 0:
        sys.stdout.write("".join(lines.get_nowait_batch(waiting)))
        sys.stdout.flush()


class _Sender(io.TextIOBase):
    """A text file whose content goes into a queue."""

    def __init__(self, lines: Queue) -> None:
        self._lines = lines

    def write(self, text: str) -> int:
        self._lines.put(text)
        return len(text)


def _drive(recipe: Recipe, recipe_name: str, phase_range: PhaseRange, lines: Queue) -> None:
    """Run the sweep, as a task on the cluster; the same steps as on a cluster's head."""
    from orchestration.common.terminal import Console
    from orchestration.preflight.checks import prepare
    from orchestration.preflight.start import check_start
    from orchestration.reporting.display import Display
    from orchestration.sweep.run import run_sweep

    console = Console(file=cast(IO[str], _Sender(lines)), width=160)
    with Display(console) as display:
        check_start(recipe)
        run_sweep(
            prepare(recipe),
            display,
            console,
            address="auto",
            recipe_name=recipe_name,
            phase_range=phase_range,
        )
