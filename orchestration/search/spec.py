"""The specification of a search: its space, trials and resources."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ray.tune import Trainable
from ray.tune.experiment import Trial
from ray.tune.schedulers import FIFOScheduler, TrialScheduler

from orchestration.search.limits import NONE, Limits
from orchestration.search.space import Space


@dataclass(frozen=True)
class Search:
    """One search of a phase.

    Attributes:
        name: of Tune's experiment.
        trainable: the class or function of Tune that runs a trial, with its resources.
        space: the searched keys and their distributions.
        trials: number of trials.
        concurrent: number of trials that run at once.
        storage: folder or URI for Tune's own state.
        seed: of all random choices.
        sampler: name of the sampler: ``tpe``, ``random``, ``grid``, ``cmaes``, ``nsga2`` or ``gp``.
        first: proposals that are tried before those of the sampler.
        scheduler: makes the scheduler, which may stop trials early or make them a population.
        cost: the metric of a second objective, which is minimised; ``None``: there is one objective.
        limits: the recipe's limits: failures, minutes of a trial.
        fits: returns how many trials fit on the present nodes; ``None``: ``concurrent`` stays as it is.
        reuse_actors: whether the process of a trial runs further trials.
        complete: whether these are the last metrics of a trial.
        names: gives a trial its name; ``None``: as Tune does.
        say: prints a line for the user.
    """

    name: str
    trainable: type[Trainable] | Callable[..., Any]
    space: Space
    trials: int
    concurrent: int
    storage: str
    seed: int
    sampler: str = "tpe"
    first: Sequence[dict[str, Any]] = ()
    scheduler: Callable[[], TrialScheduler] = FIFOScheduler
    cost: str | None = None
    limits: Limits = NONE
    fits: Callable[[], int] | None = None
    reuse_actors: bool = False
    complete: Callable[[Mapping[str, Any]], bool] = lambda metrics: True
    names: Callable[[Trial], str] | None = None
    say: Callable[[str], None] = lambda text: None
