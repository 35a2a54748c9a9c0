"""What a search tries next: Optuna's samplers, told of what is known."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import optuna
from ray.tune.search import ConcurrencyLimiter
from ray.tune.search.optuna import OptunaSearch

from orchestration.search_space import Space, contains
from orchestration.trial_log import TrialLog, TrialRecord

if TYPE_CHECKING:
    from orchestration.search import Search

optuna.logging.set_verbosity(optuna.logging.ERROR)
_STUDY = "search"
_MOST_TOLD = 1000
_SAMPLERS: dict[str, Callable[..., optuna.samplers.BaseSampler]] = {
    "tpe": optuna.samplers.TPESampler,
    "random": optuna.samplers.RandomSampler,
    "grid": optuna.samplers.RandomSampler,  # its points are all given
    "cmaes": optuna.samplers.CmaEsSampler,
    "nsga2": optuna.samplers.NSGAIISampler,
    "gp": optuna.samplers.GPSampler,
}


def proposals(search: Search, log: TrialLog) -> ConcurrencyLimiter | None:
    """The search's sampler behind its limit of trials at once; nothing where there is no space."""
    if not search.space:
        return None
    known = [record for record in log.ended if contains(search.space, record.values)]
    tried = [record.values for record in known]
    # what was broken off goes on first
    pending = [values for values in log.pending if contains(search.space, values)]
    first = pending + [values for values in search.first if values not in pending]
    # a resumed search draws anew: another seed, or it would propose again what is known
    sampler = _SAMPLERS[search.sampler](seed=search.seed + len(known))
    goals = {"score": "max"} | ({search.cost: "min"} if search.cost else {})
    searcher = OptunaSearch(
        search.space,
        metric=list(goals) if search.cost else "score",
        mode=list(goals.values()) if search.cost else "max",
        sampler=sampler,
        points_to_evaluate=[values for values in first if values not in tried],
        storage=_told(search.space, telling(known), goals),
        study_name=_STUDY,
    )
    return ConcurrencyLimiter(searcher, max_concurrent=search.concurrent)


def telling(known: Sequence[TrialRecord]) -> list[TrialRecord]:
    """All, or of very many the best and the newest: TPE goes through all each time."""
    if len(known) <= _MOST_TOLD:
        return list(known)
    ranked = sorted(known, key=lambda record: math.inf if record.score is None else -record.score)
    best = ranked[: _MOST_TOLD // 10]
    numbers = {record.number for record in best}
    newest = [record for record in known if record.number not in numbers][-(_MOST_TOLD - len(best)) :]
    return sorted([*best, *newest], key=lambda record: record.number)


def _told(
    space: Space, known: Sequence[TrialRecord], goals: Mapping[str, str]
) -> optuna.storages.InMemoryStorage:
    """A study that knows these trials' results (Tune's own way of telling takes one objective only)."""
    place = optuna.storages.InMemoryStorage()
    study = optuna.create_study(
        storage=place, study_name=_STUDY, directions=[f"{goal}imize" for goal in goals.values()]
    )
    for record in known:
        figures = {**record.metrics, "score": record.score}
        values = [figures.get(goal) for goal in goals]
        if all(value is not None and math.isfinite(value) for value in values):
            study.add_trial(
                optuna.trial.create_trial(values=values, params=record.values, distributions=space)
            )
    return place
