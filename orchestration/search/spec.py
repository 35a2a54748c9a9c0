"""The specification of a search: its space, trials and resources; the protocol of its observers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from ray.tune.experiment import Trial
from ray.tune.schedulers import FIFOScheduler, TrialScheduler

from orchestration.search.limits import NONE, Limits
from orchestration.search.space import Space
from orchestration.state.trial_log import TrialRecord
from trainers.loop.report import EpochReport


class Observer(Protocol):
    """Is called when trials start, report and end: the display and the tracker are such."""

    def trial_started(
        self, trial_id: str, number: int, values: dict[str, Any], before: str | None
    ) -> str | None:
        """Returns the trial's run in the tracker; ``before`` is the one it had when it was broken off."""

    def trial_reported(self, trial_id: str, metrics: EpochReport) -> None: ...

    def trial_ended(self, trial_id: str, record: TrialRecord) -> str | None:
        """Returns the trial's run in the tracker."""


@dataclass(frozen=True)
class Search:
    """One search of a phase."""

    name: str
    trainable: Any
    space: Space
    trials: int
    concurrent: int
    storage: str
    seed: int
    sampler: str = "tpe"
    first: Sequence[dict[str, Any]] = ()
    scheduler: Callable[[], TrialScheduler] = FIFOScheduler
    cost: str | None = None  # a second objective: the metric that is to be small
    limits: Limits = NONE
    fits: Callable[[], int] | None = None  # how many run at once, as nodes come and go
    reuse_actors: bool = False
    complete: Callable[[Mapping[str, Any]], bool] = lambda metrics: True
    names: Callable[[Trial], str] | None = None
    say: Callable[[str], None] = lambda text: None
