"""A search whose trials are Ray Train runs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ray import tune

from orchestration.search.pbt_trial import population_trial
from orchestration.search.runner import run_search
from orchestration.search.spec import Observer, Search
from orchestration.search.training_trial import RunNames, training_trial
from orchestration.state.trial_log import TrialLog, TrialRecord
from orchestration.sweep.context import Sweep


def training_search(
    sweep: Sweep,
    name: str,
    jobs: Any,
    *,
    folder: str,
    scratch: str,
    epochs: int,
    population: Mapping[str, Any] | None = None,
    **others: Any,
) -> Search:
    """A search of one trial, unless ``others`` say more.

    Args:
        jobs: gives the job (a dictionary) of a proposal.
        folder: of the runs; what was broken off is found there again.
        scratch: where Tune keeps its own state.
        epochs: of a run that was not stopped before.
        population: what else each trial is told that may go on as another one.
        others: more of :class:`Search`.
    """
    resources = sweep.recipe.resources
    if population is None:
        trial = tune.with_parameters(training_trial, jobs=jobs, resources=resources, storage=folder)
    else:
        trial = tune.with_parameters(
            population_trial, jobs=jobs, resources=resources, runs=folder, **population
        )

    def complete(metrics: Mapping[str, Any]) -> bool:
        return bool(metrics.get("epoch", 0) >= epochs)

    whole: dict[str, Any] = {
        "name": name,
        # The function takes next to nothing, as its workers reserve what they need; a sliver of a processor
        # would already keep a group as large as the cluster from ever being placed.
        "trainable": tune.with_resources(trial, {"memory": 1 << 20}),
        "space": {},
        "trials": 1,
        "concurrent": 1,
        "storage": scratch,
        "seed": sweep.recipe.seed,
        "complete": complete,
        "names": None if population is not None else RunNames(complete),
    }
    return Search(**{**whole, **others})


def run_training(
    sweep: Sweep, name: str, job: dict[str, Any], log: TrialLog, runs: Observer, *, folder: str
) -> tuple[TrialRecord, str]:
    """One run, from where it was broken off if it was; its record and its checkpoint.

    Raises:
        RuntimeError: it failed.
    """
    epochs = job["training"]["epochs"]
    with sweep.scratch(name) as scratch:
        search = training_search(
            sweep, name, lambda values: job, folder=folder, scratch=scratch, epochs=epochs
        )
        run_search(search, log, runs)
    best = log.best()
    assert best.checkpoint is not None, "a finished training run has reported a checkpoint"
    return best, best.checkpoint
