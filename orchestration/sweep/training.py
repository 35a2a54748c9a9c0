"""Ray Train runs of a sweep: a single one, or a search whose trials are such."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from ray import tune

from orchestration.search.pbt_trial import population_trial
from orchestration.search.single_run import run_single
from orchestration.search.spec import Observer, Search
from orchestration.search.training_trial import Jobs, RunNames, TrainingTrial
from orchestration.state.trial_log import TrialLog, TrialRecord
from orchestration.sweep.context import Sweep
from trainers.config.jobs import TrainJob


@dataclass(frozen=True)
class PopulationState:
    """What trials of a population need beside their jobs.

    Attributes:
        known: members that an interruption broke off, by the digest of their values.
        every: epochs between two comparisons of the members.
    """

    known: Mapping[str, Mapping[str, Any]]
    every: int


def training_search(
    sweep: Sweep,
    name: str,
    jobs: Jobs,
    *,
    folder: str,
    scratch: str,
    epochs: int,
    population: PopulationState | None = None,
) -> Search:
    """A search over runs, still without its space and its trials: ``dataclasses.replace`` adds them.

    Args:
        name: of the search, for Tune.
        folder: of the runs; what was broken off is found there again.
        scratch: where Tune keeps its own state.
        epochs: of a run that was not stopped early.
        population: for trials that may go on from the checkpoints of others (population-based training).
    """
    resources = sweep.recipe.resources
    if population is None:
        trial = tune.with_parameters(TrainingTrial, jobs=jobs, resources=resources, storage=folder)
    else:
        trial = tune.with_parameters(
            population_trial,
            jobs=jobs,
            resources=resources,
            runs=folder,
            known=population.known,
            every=population.every,
        )

    return Search(
        name=name,
        # The trial takes next to nothing, as its workers reserve what they need; a sliver of a processor
        # would already keep a group as large as the cluster from ever being placed.
        trainable=tune.with_resources(trial, {"memory": 1 << 20}),
        space={},
        trials=1,
        concurrent=1,
        storage=scratch,
        seed=sweep.recipe.seed,
        complete=_complete(epochs),
        names=None if population is not None else RunNames(_complete(epochs)),
    )


def run_training(
    sweep: Sweep, job: TrainJob, log: TrialLog, runs: Observer, *, folder: str
) -> tuple[TrialRecord, str]:
    """One training run, which goes on where it was broken off.

    Args:
        folder: of the run.

    Returns:
        Its record, and the URI of its checkpoint.

    Raises:
        RuntimeError: it failed.
    """
    complete = _complete(job.training.epochs)
    run_single(job, sweep.recipe.resources, folder, log, runs, complete=complete)
    best = log.best()
    assert best.checkpoint is not None, "a finished training run has reported a checkpoint"
    return best, best.checkpoint


def _complete(epochs: int) -> Callable[[Mapping[str, Any]], bool]:
    """Tells whether a report is the last one of a run of so many epochs."""
    return lambda report: bool(report.get("epoch", 0) >= epochs)
