"""Ray Train runs of a sweep: a single one, or a search whose trials are such."""

from __future__ import annotations

import time
import traceback
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

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
from orchestration.state.trial_end import Observer, ended, is_of_epoch, last_words, say_rest, write_down
from orchestration.state.trial_log import State, TrialLog, TrialRecord
from orchestration.sweep.context import Sweep
from trainers.config.jobs import TrainJob
from trainers.loop.report import EpochReport

_VALUES: dict[str, Any] = {}  # it is proposed nothing: all is as the recipe says
_STOP_SECONDS = 2.0  # for an interrupted run to end in order


@dataclass(frozen=True)
class PopulationState:
    """What trials of a population need beside their jobs.

    Attributes:
        known: members that an interruption broke off, by the digest of their values.
        every: epochs between two comparisons of the members.
    """

    known: Mapping[str, Mapping[str, Any]]
    every: int


def training_trial(
    resources: Resources, jobs: Jobs, folder: str, population: PopulationState | None = None
) -> Any:
    """What Tune starts for a trial that is a Train run.

    Args:
        resources: of a run.
        jobs: makes the job of a proposal.
        folder: of the runs; what was broken off is found there again.
        population: for trials that may go on from the checkpoints of others (population-based training).
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
    # The trial takes next to nothing, as its workers reserve what they need; a sliver of a processor
    # would already keep a group as large as the cluster from ever being placed.
    return tune.with_resources(trial, {"memory": 1 << 20})


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
    run_single(job, sweep.recipe.resources, folder, log, runs)
    best = log.best()
    assert best.checkpoint is not None, "a finished training run has reported a checkpoint"
    return best, best.checkpoint


def run_single(job: TrainJob, resources: Resources, storage: str, log: TrialLog, observer: Observer) -> None:
    """Run a job from this process, unless the log has it already; one that was broken off goes on.

    One that fails is in the log as failed, and the next call begins it again.

    Args:
        job: of the run.
        resources: of its workers.
        storage: folder or URI of the run.
        log: of its phase.
        observer: hears of its start, its reports and its end.
    """
    say_rest(log, observer)
    if log.ended:
        return
    number = max((record.number for record in log.trials), default=-1) + 1
    name = digest(_VALUES)  # as a search's trials are named, whose runs earlier versions began
    began, before = time.monotonic(), log.broken_off(_VALUES)
    log.begin(number, _VALUES, observer.trial_started(name, number, _VALUES, before))
    last, error = EpochReport(), []
    pool, reports = WorkerPool(), Reports()
    run = BackgroundRun(train_run(job, resources, storage, name, reports, pool=pool), reports)
    try:
        while (report := run.next_report()) is not None:
            if is_of_epoch(report):
                last = cast(EpochReport, report)
                observer.trial_reported(name, last)
    except TrainingFailedError as failure:
        error = last_words("".join(traceback.format_exception(failure)))
    finally:
        run.stop(_STOP_SECONDS)
        pool.close()
    whole = is_whole(last, epochs=job.training.epochs)
    state: State = "failed" if error else "finished" if whole else "stopped"
    seconds = time.monotonic() - began
    record = ended(number, _VALUES, state, last, seconds=seconds, error=error)
    write_down(record, last, log, observer, name)


def is_whole(report: Mapping[str, Any], *, epochs: int) -> bool:
    """Whether a report is the last one of a run of so many epochs."""
    return bool(report.get("epoch", 0) >= epochs)
