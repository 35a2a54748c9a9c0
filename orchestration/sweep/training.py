"""Ray Train runs of a sweep: a single one, or a search whose trials are such."""

from __future__ import annotations

import time
import traceback
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ray import tune
from ray.train import TrainingFailedError

from orchestration.common.hashing import digest
from orchestration.recipe.schema import Resources
from orchestration.search.pbt_trial import population_trial
from orchestration.search.standing_workers import WorkerPool
from orchestration.search.training_trial import (
    BackgroundRun,
    Jobs,
    Reports,
    TrainingTrial,
    train_run,
)
from orchestration.state.trial_end import Observer, ended, last_lines, record_end, report_missing_ends
from orchestration.state.trial_log import State, TrialLog, TrialRecord
from orchestration.sweep.context import Sweep
from trainers.config.jobs import TrainJob
from trainers.loop.report import EpochReport, of_epoch

_VALUES: dict[str, Any] = {}  # the proposal of a run without a search: all values are the recipe's
_STOP_SECONDS = 2.0  # for an interrupted run to end in order


@dataclass(frozen=True)
class PopulationState:
    """The inputs of a population's trials, besides their jobs.

    Attributes:
        known: members of interrupted trials, by the hash of their values.
        every: epochs between two comparisons of the members.
    """

    known: Mapping[str, Mapping[str, Any]]
    every: int


def training_trial(
    resources: Resources, jobs: Jobs, folder: str, population: PopulationState | None = None
) -> Any:
    """Make the trainable that Tune starts for a trial that is a Ray Train run.

    Args:
        resources: of a run.
        jobs: makes the job of a proposal.
        folder: of the runs; interrupted runs are found there again.
        population: for population-based training, whose trials may continue from checkpoints of others.

    Returns:
        The trainable, with its resources.
    """
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
    # The trial itself reserves almost nothing, because its workers reserve their resources. With even a small
    # share of a processor for it, a group of workers as large as the cluster could never be placed.
    return tune.with_resources(trial, {"memory": 1 << 20})


def run_training(
    sweep: Sweep, job: TrainJob, log: TrialLog, runs: Observer, *, folder: str
) -> tuple[TrialRecord, str]:
    """Do one training run; an interrupted run resumes.

    Args:
        sweep: the sweep, with the resources of the phase.
        job: what the run does.
        log: the trial log of the phase.
        runs: the MLflow runs of the phase.
        folder: of the run.

    Returns:
        Its record, and the path or URI of its checkpoint.

    Raises:
        RuntimeError: the run failed.
    """
    run_single(job, sweep.recipe.resources, folder, log, runs)
    best = log.best()
    assert best.checkpoint is not None, "a finished training run has reported a checkpoint"
    return best, best.checkpoint


def run_single(job: TrainJob, resources: Resources, storage: str, log: TrialLog, observer: Observer) -> None:
    """Run a job from this process, unless its result is in the log already; an interrupted run resumes.

    A run that fails is recorded in the log as failed, and the next call starts it again.

    Args:
        job: what the run does.
        resources: of its workers.
        storage: folder or URI of the run.
        log: the trial log of the phase.
        observer: is called at its start, its reports and its end.
    """
    report_missing_ends(log, observer)
    if log.ended:
        return
    number = max((record.number for record in log.trials), default=-1) + 1
    name = digest(_VALUES)  # the name of a search's trial: runs that earlier versions began are found by it
    began, before = time.monotonic(), log.broken_off(_VALUES)
    log.begin(number, _VALUES, observer.trial_started(name, number, _VALUES, before))
    last, error = EpochReport(), []
    pool, reports = WorkerPool(), Reports()
    run = BackgroundRun(train_run(job, resources, storage, name, reports, pool=pool), reports)
    try:
        while (result := run.next_report()) is not None:
            if (report := of_epoch(result)) is not None:
                last = report
                observer.trial_reported(name, report)
    except TrainingFailedError as failure:
        error = last_lines("".join(traceback.format_exception(failure)))
    finally:
        run.stop(_STOP_SECONDS)
        pool.close()
    whole = is_whole(last, epochs=job.training.epochs)
    state: State = "failed" if error else "finished" if whole else "stopped"
    seconds = time.monotonic() - began
    record = ended(number, _VALUES, state, last, seconds=seconds, error=error)
    record_end(record, last, log, observer, name)


def is_whole(report: Mapping[str, Any], *, epochs: int) -> bool:
    """Return whether a report is the last one of a run of ``epochs`` epochs."""
    return bool(report.get("epoch", 0) >= epochs)
