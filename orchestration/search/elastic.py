"""A search that grows and shrinks with its cluster."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, Protocol

from ray import tune
from ray.tune.experiment import Trial

from pruners.errors import InputError

_LOOK_SECONDS = 10.0


class Limiter(Protocol):
    """What a number of trials at once is told."""

    def set_max_concurrency(self, most: int, /) -> Any: ...


class FollowCluster(tune.Callback):  # type: ignore[misc]
    """Lets as many trials run at once as fit the nodes that there are now.

    Args:
        limiter: of the search's proposals, or of its trials.
        fits: how many trials the cluster can take; an :class:`InputError` where it is not even one.
    """

    def __init__(self, limiter: Limiter, fits: Callable[[], int]) -> None:
        self._limiter, self._fits = limiter, fits
        self._looked = time.monotonic()

    def __reduce__(self) -> Any:
        return tune.Callback, ()  # Tune pickles its callbacks to restore an experiment, which we do not

    def on_step_end(self, iteration: int, trials: list[Trial], **info: Any) -> None:
        if time.monotonic() - self._looked < _LOOK_SECONDS:
            return
        self._looked = time.monotonic()
        try:
            most = self._fits()
        except InputError:
            most = 1  # it waits for nodes to come
        self._limiter.set_max_concurrency(max(most, 1))
