"""A search: Optuna proposes, Ray Tune runs, every trial that ends is recorded at once."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ray import tune
from ray.air.execution._internal.actor_manager import RayActorManager
from ray.exceptions import OutOfMemoryError, RayActorError
from ray.tune.experiment import Trial
from ray.tune.schedulers import TrialScheduler
from ray.tune.search import ConcurrencyLimiter

from orchestration.search.limits import FailureStopper, end_by_force
from orchestration.search.pbt import Population, domains, draws, history, take_note
from orchestration.search.samplers import ROUND, Proposals, limited
from orchestration.search.schedulers import FollowCluster, Remembered
from orchestration.search.spec import Search
from orchestration.state.trial_end import (
    Observer,
    ended,
    last_lines,
    reason,
    record_end,
    report_missing_ends,
)
from orchestration.state.trial_log import State, TrialLog
from pruners.errors import first_line
from trainers.loop.report import EpochReport, of_epoch
from trainers.storage import resolve


def treat_oom_as_actor_death() -> None:
    """Make Tune treat an out-of-memory kill as the death of the trial's actor, which it is.

    A call to a trial's actor can fail in two ways that Tune handles: the actor dies, or the call raises an
    error. Any other failure ends the whole experiment. If Ray's memory monitor kills the actor, Ray raises an
    error of a third kind. No setting changes this, so Tune's method for failed calls is wrapped.
    """
    original = RayActorManager._actor_task_failed
    if getattr(original, "treats_oom_as_actor_death", False):
        return

    def fail_trial(self: Any, tracked_actor_task: Any, exception: Exception) -> None:
        if isinstance(exception, OutOfMemoryError):
            exception = RayActorError(error_msg=first_line(exception))
        original(self, tracked_actor_task=tracked_actor_task, exception=exception)

    fail_trial.treats_oom_as_actor_death = True  # type: ignore[attr-defined]
    RayActorManager._actor_task_failed = fail_trial


def run_search(search: Search, log: TrialLog, observer: Observer) -> None:
    """Run the trials that are not in ``log`` yet.

    A resumed search continues as if it had not been interrupted: its sampler and its early-stopping rule
    first replay the log, and interrupted trials start again with their old numbers.

    Args:
        search: the search.
        log: its trial log, to which each trial is added when it ends.
        observer: is called when trials start, report and end.

    Raises:
        RuntimeError: more trials failed than the limits allow.
    """
    treat_oom_as_actor_death()
    report_missing_ends(log, observer)
    missing = search.trials - len(log.ended)
    if missing <= 0:
        return
    given_up = FailureStopper(search.limits, search.trials)
    scheduler = search.scheduler()
    proposals = None
    if not isinstance(scheduler, Population):
        proposals = Proposals(search, log)
        if isinstance(scheduler, Remembered):
            scheduler.remember(log, proposals.numbers, search.seed)
    # in rounds: Tune's work for each trial grows with the number of trials in a run of Tune
    while missing > 0:
        trials = min(missing, ROUND if proposals is None else proposals.room)
        _run_round(search, log, _Recorder(search, log, observer, given_up, proposals), scheduler, trials)
        given_up.check()
        missing -= trials


def _run_round(
    search: Search, log: TrialLog, recorder: _Recorder, scheduler: TrialScheduler, trials: int
) -> None:
    system, path = resolve(search.storage)
    callbacks: list[tune.Callback] = [recorder]
    space = None
    limiter: Any = recorder.limiter
    searcher: Any = limiter
    if limiter is None:  # a population limits its trials itself
        limiter, space = scheduler, domains(search.space)
        searcher = draws(search.space, log, search.first, trials, search.seed)
    if search.fits is not None:
        callbacks.append(FollowCluster(limiter, search.fits))
    tune.Tuner(
        search.trainable,
        param_space=space,
        tune_config=tune.TuneConfig(
            search_alg=searcher,
            num_samples=trials,
            trial_name_creator=search.names,
            scheduler=scheduler,
            reuse_actors=search.reuse_actors,
        ),
        run_config=tune.RunConfig(
            name=search.name,
            storage_path=path,
            storage_filesystem=system,
            callbacks=callbacks,
            stop=recorder.given_up,
            checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
            verbose=0,
        ),
    ).fit()


@dataclass
class _Running:
    number: int
    started: float
    trial: Trial
    late: str | None = None  # the reason, if it is ended by force
    metrics: EpochReport = field(default_factory=EpochReport)
    member: dict[str, Any] = field(default_factory=dict)  # its member of a population


class _Recorder(tune.Callback):  # type: ignore[misc]
    """Records every trial that ends in the log, and calls the observer."""

    def __init__(
        self,
        search: Search,
        log: TrialLog,
        observer: Observer,
        given_up: FailureStopper,
        proposals: Proposals | None,
    ) -> None:
        self._search = search
        self._log = log
        self._observer = observer
        self._proposals = proposals
        self.given_up = given_up
        self._running: dict[str, _Running] = {}
        self._first = max((record.number for record in log.trials), default=-1) + 1
        self._looked = time.monotonic()

    def __reduce__(self) -> Any:
        # Tune pickles its callbacks to restore an experiment; we resume from the trial log instead
        return tune.Callback, ()

    @property
    def limiter(self) -> ConcurrencyLimiter | None:
        """The proposals for one round of Tune, with a limit of running trials; ``None`` for a population."""
        if self._proposals is None:
            return None
        self._proposals.begin_round()
        return limited(self._proposals, self._search.concurrent)

    def _number(self, trial: Trial, trials: list[Trial]) -> int:
        """A trial's number, in the order of the proposals and not of the starts."""
        if self._proposals is not None:
            return self._proposals.numbers[trial.trial_id]
        return self._first + trials.index(trial)

    def on_trial_start(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        if trial.trial_id in self._running:
            return
        number = self._number(trial, trials)
        values = dict(trial.config)
        self._running[trial.trial_id] = _Running(number, time.monotonic(), trial)
        before = self._log.broken_off(values)
        self._log.begin(number, values, self._observer.trial_started(trial.trial_id, number, values, before))

    def on_trial_result(
        self, iteration: int, trials: list[Trial], trial: Trial, result: dict[str, Any], **info: Any
    ) -> None:
        running = self._running[trial.trial_id]
        numbers = {trial.trial_id: self._first + position for position, trial in enumerate(trials)}
        running.member = take_note(self._log, running.number, result, numbers)
        if (report := of_epoch(result)) is not None:
            running.metrics = report
            self._observer.trial_reported(trial.trial_id, report)

    def on_trial_complete(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        running = self._running[trial.trial_id]
        complete = bool(running.metrics) and self._search.complete(running.metrics)
        self._end(trial, "finished" if complete else "stopped")

    def on_trial_error(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        self.on_trial_start(iteration, trials, trial)  # its actor may have failed before it began
        late = self._running[trial.trial_id].late
        lines = [late] if late else last_lines(_trace_of(trial))
        self.given_up.note(reason(lines))
        self._end(trial, "failed", lines)

    def on_step_end(self, iteration: int, trials: list[Trial], **info: Any) -> None:
        waited, self._looked = time.monotonic() - self._looked, time.monotonic()
        for running in self._running.values():
            if running.trial.status != Trial.RUNNING:  # a paused trial: its time does not count
                running.started += waited
        if self._search.limits.settings.trial_minutes is None:
            return
        for running in self._running.values():
            if running.late is None:
                running.late = self._search.limits.overdue(running.started)
                if running.late:
                    end_by_force(running.trial)

    def _end(self, trial: Trial, state: State, lines: Sequence[str] = ()) -> None:
        running = self._running.pop(trial.trial_id)
        record = ended(
            running.number,
            trial.config,
            state,
            running.metrics,
            seconds=time.monotonic() - running.started,
            error=lines,
            cost=self._search.cost,
        )
        record = replace(
            record,
            metrics={**record.metrics, **history(running.member)},
            given=record.values in list(self._search.first),
        )
        record = record_end(record, running.metrics, self._log, self._observer, trial.trial_id)
        if self._proposals is not None:
            self._proposals.tell(record)


def _trace_of(trial: Trial) -> str:
    """The content of a failed trial's error file."""
    name = trial.run_metadata.error_filename
    file = Path(trial.local_path or "", name or "")
    return file.read_text(errors="replace") if name is not None and file.is_file() else ""
