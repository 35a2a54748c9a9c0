"""The specification of a search: its space, trials and resources."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ray.tune.experiment import Trial
from ray.tune.schedulers import FIFOScheduler, TrialScheduler

from orchestration.search.limits import NONE, Limits
from orchestration.search.space import Space


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
