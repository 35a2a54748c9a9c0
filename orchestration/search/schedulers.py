"""Early stopping: Ray's schedulers, fed from the trial log.

A trial is compared with earlier trials at the same point of training. After an interruption the rule replays
all comparisons of the log, so that it decides as if there had been none.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from ray import tune
from ray.tune.experiment import Trial
from ray.tune.schedulers import AsyncHyperBandScheduler, FIFOScheduler, MedianStoppingRule, TrialScheduler

from orchestration.state.trial_log import TrialLog
from pruners.errors import InputError

_BRACKETS = 3  # of hyperband: grace periods of 1, η and η² times the given one


def stopping(kind: str, time: str, grace: int, reduction: int, longest: int) -> TrialScheduler:
    """Make the early-stopping rule of a search: at equal values of ``time`` the better trials continue.

    Args:
        kind: ``median`` (median stopping), ``asha`` or ``hyperband`` (asynchronous successive halving, with
            one bracket or several).
        time: the reported metric by which trials are compared (``recovery_epochs``: epochs at the final
            sparsity).
        grace: the least value of ``time`` at which a trial may be stopped.
        reduction: of the trials at a rung, one in ``reduction`` continues; not used by ``median``.
        longest: the largest value of ``time`` that a trial can reach; not used by ``median``.

    Returns:
        The scheduler, which logs its comparisons (:class:`Remembered`).
    """
    score: dict[str, Any] = {"time_attr": time, "metric": "score", "mode": "max", "grace_period": grace}
    if kind == "median":
        return RememberedMedian(**score, min_samples_required=2, hard_stop=True)
    brackets = _BRACKETS if kind == "hyperband" else 1
    return RememberedHalving(
        **score, reduction_factor=reduction, max_t=max(longest, grace + 1), brackets=brackets
    )


@dataclass(frozen=True)
class _Numbered:
    """Stands for a trial, with its number as name: Tune's own names change with every start."""

    trial_id: str


class _NoOthers:
    """Stands for Tune's controller during the replay, when there are no live trials."""

    def get_live_trials(self) -> list[Trial]:
        return []


class Remembered(FIFOScheduler):  # type: ignore[misc]
    """Mixin for Ray's schedulers that logs every comparison, and can replay them.

    A trial that resumes from its last checkpoint repeats earlier reports; these are ignored.
    """

    _grace_period: float
    _time_attr: str

    def __reduce__(self) -> Any:
        # Tune pickles it to restore an experiment; we resume from the trial log, which must not be pickled
        return FIFOScheduler, ()

    def remember(self, log: TrialLog, numbers: Mapping[str, int], seed: int) -> None:
        """Replay the comparisons that the log holds.

        Args:
            log: the trial log of the search.
            numbers: number of each trial by Tune's name of it; filled as trials are proposed.
            seed: of the rule's random numbers.
        """
        self._log, self._numbers, self._seed = log, numbers, seed
        self._last: dict[int, tuple[float, float]] = {}
        for event in log.history:
            if event.kind == "asked":
                self._enter(_NoOthers(), event.number)
            elif event.at_end:
                self._last[event.number] = event.time, event.score
            elif event.kind == "rung":
                self._look(_NoOthers(), event.number, event.time, event.score)
            elif event.ended is not None and event.ended.state != "failed":
                self._leave(_NoOthers(), event.number)

    def on_trial_add(self, tune_controller: Any, trial: Trial) -> None:
        self._enter(tune_controller, self._numbers[trial.trial_id])

    def on_trial_result(self, tune_controller: Any, trial: Trial, result: dict[str, Any]) -> str:
        number = self._numbers[trial.trial_id]
        if not self._is_news(number, result):
            return str(TrialScheduler.CONTINUE)
        time, score = result[self._time_attr], result[self.metric]
        decision = self._look(tune_controller, number, time, score)
        self._log.compare(number, time, score, goes_on=decision != TrialScheduler.STOP)
        return decision

    def on_trial_complete(self, tune_controller: Any, trial: Trial, result: dict[str, Any]) -> None:
        number = self._numbers[trial.trial_id]
        if self._is_news(number, result):  # Tune gives the rule a trial's last report only here
            self._last[number] = time, score = result[self._time_attr], result[self.metric]
            self._log.compare(number, time, score, goes_on=False, at_end=True)
        self._leave(tune_controller, number)

    def on_trial_remove(self, tune_controller: Any, trial: Trial) -> None:
        super().on_trial_remove(tune_controller, self._known(self._numbers[trial.trial_id]))

    def _is_news(self, number: int, result: Mapping[str, Any]) -> bool:
        if self._time_attr not in result or self.metric not in result:
            return False
        before = self._last.get(number, (-math.inf, 0.0))[0]
        return bool(before < result[self._time_attr] >= self._grace_period)

    def _enter(self, controller: Any, number: int) -> None:
        with _drawing(self._seed, number):
            super().on_trial_add(controller, self._known(number))

    def _look(self, controller: Any, number: int, time: float, score: float) -> str:
        self._last[number] = time, score
        result = {self._time_attr: time, self.metric: score}
        return str(super().on_trial_result(controller, self._known(number), result))

    def _leave(self, controller: Any, number: int) -> None:
        if number in self._last:
            result = dict(zip((self._time_attr, self.metric), self._last[number], strict=True))
            super().on_trial_complete(controller, self._known(number), result)

    @staticmethod
    def _known(number: int) -> Any:
        return _Numbered(str(number))


@contextmanager
def _drawing(seed: int, number: int) -> Iterator[None]:
    """Seed NumPy's global generator for one trial: Ray draws a trial's bracket from it."""
    before = np.random.get_state()
    np.random.seed(np.random.SeedSequence([seed, number]).generate_state(1)[0])
    try:
        yield
    finally:
        np.random.set_state(before)


class RememberedHalving(Remembered, AsyncHyperBandScheduler):  # type: ignore[misc]
    def __init__(self, *, grace_period: float, **options: Any) -> None:
        super().__init__(grace_period=grace_period, **options)
        self._grace_period = grace_period


class RememberedMedian(Remembered, MedianStoppingRule):  # type: ignore[misc]
    """Median stopping whose comparisons are logged and replayed."""


_LOOK_SECONDS = 10.0


class Limiter(Protocol):
    """Takes the number of trials that may run at once."""

    def set_max_concurrency(self, most: int, /) -> Any: ...


class FollowCluster(tune.Callback):  # type: ignore[misc]
    """Lets as many trials run at once as fit on the present nodes of the cluster.

    Args:
        limiter: limits the proposals of the search, or its trials.
        fits: returns how many trials the cluster can take; raises an :class:`InputError` if not even one.
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
            most = 1  # this trial waits for new nodes
        self._limiter.set_max_concurrency(max(most, 1))
