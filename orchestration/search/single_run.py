"""A training run that no other is compared with: in the driver's own process, without Tune."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Mapping
from typing import Any, cast

from ray.train import TrainingFailedError

from orchestration.common.hashing import digest
from orchestration.recipe.schema import Resources
from orchestration.search.spec import Observer
from orchestration.search.standing_workers import WorkerPool
from orchestration.search.training_trial import BackgroundRun, Reports, train_run
from orchestration.search.trial_end import ended, is_of_epoch, last_words, say_rest, write_down
from orchestration.state.trial_log import State, TrialLog
from trainers.config.jobs import TrainJob
from trainers.loop.report import EpochReport

_VALUES: dict[str, Any] = {}  # it is proposed nothing: all is as the recipe says
_STOP_SECONDS = 2.0  # for an interrupted run to end in order


def run_single(
    job: TrainJob,
    resources: Resources,
    storage: str,
    log: TrialLog,
    observer: Observer,
    *,
    complete: Callable[[Mapping[str, Any]], bool],
) -> None:
    """Run a job, unless the log has it already; one that was broken off goes on.

    One that fails is in the log as failed, and the next call begins it again.

    Args:
        job: of the run.
        resources: of its workers.
        storage: folder or URI of the run.
        log: of its phase.
        observer: hears of its start, its reports and its end.
        complete: whether a report is the last one of a whole run.
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
    state: State = "failed" if error else "finished" if last and complete(last) else "stopped"
    seconds = time.monotonic() - began
    record = ended(number, _VALUES, state, last, seconds=seconds, error=error)
    write_down(record, last, log, observer, name)
