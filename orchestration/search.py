"""A search: Optuna proposes, Ray Tune runs, every trial that ends is recorded at once."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from ray import tune
from ray.tune.experiment import Trial
from ray.tune.schedulers import (
    AsyncHyperBandScheduler,
    FIFOScheduler,
    MedianStoppingRule,
    TrialScheduler,
)

from orchestration.elastic import FollowCluster
from orchestration.population import Population, domains, draws, history, take_note
from orchestration.search_limits import NONE, GivenUp, Limits, end_by_force
from orchestration.search_proposals import proposals
from orchestration.search_space import Space
from orchestration.trial_log import TrialLog, TrialRecord
from orchestration.tune_memory import one_trial_pays
from trainers.storage import resolve

_TRACE_LINES = 40
_NAMED = re.compile(r"[\w.]*(Error|Exception|Interrupt)\b.*: ")
_MEMORY_ADVICE = "Refer to the documentation on how to address the out of memory issue"
_OUT_OF_MEMORY = "killed by Ray's memory monitor, as the node ran low on memory"
_ROUND = 500  # trials
_BRACKETS = 3  # of hyperband: grace periods of 1, η and η² times the given one


class Observer(Protocol):
    """Who wants to hear of trials: the display, the tracker."""

    def trial_started(
        self, trial_id: str, number: int, values: dict[str, Any], before: str | None
    ) -> str | None:
        """Returns the trial's run in the tracker; ``before`` is the one it had when it was broken off."""

    def trial_reported(self, trial_id: str, metrics: Mapping[str, Any]) -> None: ...

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


def run_search(search: Search, log: TrialLog, observer: Observer) -> None:
    """Run the trials that ``log`` does not hold yet.

    Trials of an interrupted search are told to the sampler as evaluated, so none is run twice.

    Raises:
        RuntimeError: more trials failed than the limits allow.
    """
    one_trial_pays()
    missing = search.trials - len(log.ended)
    given_up = GivenUp(search.limits, search.trials)
    # by rounds: what Tune does for a trial grows with the number of those that it has seen
    for begin in range(0, missing, _ROUND):
        _run_round(search, log, observer, given_up, min(missing - begin, _ROUND))
        given_up.check()


def _run_round(search: Search, log: TrialLog, observer: Observer, given_up: GivenUp, trials: int) -> None:
    system, path = resolve(search.storage)
    scheduler = search.scheduler()
    callbacks: list[tune.Callback] = [_Recorder(search, log, observer, given_up)]
    limiter: Any
    if isinstance(scheduler, Population):
        limiter = scheduler
        searcher: Any = draws(search.space, log, search.first, trials, search.seed)
    else:
        limiter = searcher = proposals(search, log)
    if limiter is not None and search.fits is not None:
        callbacks.append(FollowCluster(limiter, search.fits))
    tune.Tuner(
        search.trainable,
        param_space=domains(search.space) if limiter is scheduler else None,
        tune_config=tune.TuneConfig(
            search_alg=searcher,
            num_samples=trials,
            max_concurrent_trials=1 if searcher is None else None,  # the searcher's own limit
            trial_name_creator=search.names,
            scheduler=scheduler,
            reuse_actors=search.reuse_actors,
            metric=None if search.space else "score",
            mode=None if search.space else "max",
        ),
        run_config=tune.RunConfig(
            name=search.name,
            storage_path=path,
            storage_filesystem=system,
            callbacks=callbacks,
            stop=given_up,
            checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
            verbose=0,
        ),
    ).fit()


def stopping(kind: str, time: str, grace: int, reduction: int, longest: int) -> TrialScheduler:
    """What stops trials early, by the metric ``time``: of those that come as far, the better ones go on.

    ``time`` counts where trials can be compared (``recovery_epochs``: epochs at the final sparsity).
    """
    score = {"time_attr": time, "metric": "score", "mode": "max", "grace_period": grace}
    if kind == "median":
        return MedianStoppingRule(**score, min_samples_required=2, hard_stop=True)
    brackets = _BRACKETS if kind == "hyperband" else 1
    return AsyncHyperBandScheduler(
        **score, reduction_factor=reduction, max_t=max(longest, grace + 1), brackets=brackets
    )


@dataclass
class _Running:
    number: int
    started: float
    trial: Trial
    late: str | None = None  # why it is ended by force
    metrics: dict[str, Any] = field(default_factory=dict)
    member: dict[str, Any] = field(default_factory=dict)  # of a population


class _Recorder(tune.Callback):  # type: ignore[misc]
    """Writes down every trial that ends, and tells the observer."""

    def __init__(self, search: Search, log: TrialLog, observer: Observer, given_up: GivenUp) -> None:
        self._search = search
        self._log = log
        self._observer = observer
        self._given_up = given_up
        self._running: dict[str, _Running] = {}
        self._first = max((record.number for record in log.trials), default=-1) + 1
        self._looked = time.monotonic()

    def __reduce__(self) -> Any:
        # Tune pickles its callbacks to restore an experiment; ours goes by the trial log instead
        return tune.Callback, ()

    def on_trial_start(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        if trial.trial_id in self._running:
            return
        number = self._first + trials.index(trial)  # in the order of the proposals, not of the starts
        values = dict(trial.config)
        self._running[trial.trial_id] = _Running(number, time.monotonic(), trial)
        before = self._log.broken_off(values)
        self._log.begin(number, values, self._observer.trial_started(trial.trial_id, number, values, before))

    def on_trial_result(
        self, iteration: int, trials: list[Trial], trial: Trial, result: dict[str, Any], **info: Any
    ) -> None:
        running = self._running[trial.trial_id]
        numbers = {one.trial_id: self._first + place for place, one in enumerate(trials)}
        running.member = take_note(self._log, running.number, result, numbers)
        if "step" not in result or "epoch" in result:  # others are of checkpoints within an epoch
            running.metrics = result
            self._observer.trial_reported(trial.trial_id, result)

    def on_trial_complete(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        running = self._running[trial.trial_id]
        complete = bool(running.metrics) and self._search.complete(running.metrics)
        self._end(trial, "finished" if complete else "stopped")

    def on_trial_error(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        self.on_trial_start(iteration, trials, trial)  # its actor may have failed before it began
        late = self._running[trial.trial_id].late
        said = [late] if late else _last_words(trial)
        self._given_up.note(_reason(said))
        self._end(trial, "failed", said)

    def on_step_end(self, iteration: int, trials: list[Trial], **info: Any) -> None:
        waited, self._looked = time.monotonic() - self._looked, time.monotonic()
        for running in self._running.values():
            if running.trial.status != Trial.RUNNING:  # it waits for its turn
                running.started += waited
        if self._search.limits.settings.trial_minutes is None:
            return
        for running in self._running.values():
            if running.late is None:
                running.late = self._search.limits.overdue(running.started)
                if running.late:
                    end_by_force(running.trial)

    def _end(self, trial: Trial, state: Any, said: Sequence[str] = ()) -> None:
        running = self._running.pop(trial.trial_id)
        # one that ran to its end stands for its best model at the final sparsity, another for where it was
        kept: Mapping[str, Any] = running.metrics.get("kept") or {}
        place = running.metrics.get("kept_at")
        whole = state == "finished" and bool(kept)
        last = max(kept, key=float) if whole else ""
        figures = kept[last] if whole else running.metrics
        record = TrialRecord(
            number=running.number,
            values=dict(trial.config),
            state=state,
            score=figures.get("score"),
            metrics={key: figures[key] for key in (*_KEPT, self._search.cost or "") if key in figures}
            | history(running.member),
            checkpoint=f"{place}/{last}" if whole and place else None,
            kept={level: {"checkpoint": f"{place}/{level}", **kept[level]} for level in kept}
            if whole
            else {},
            seconds=time.monotonic() - running.started,
            error=_reason(said) if said else None,
            trace="\n".join(said) if said else None,
            given=dict(trial.config) in list(self._search.first),
        )
        run_id = self._observer.trial_ended(trial.trial_id, record)
        self._log.add(TrialRecord(**{**record.__dict__, "run_id": run_id}))


_KEPT = (
    "images",
    "parameters",
    "parameters_sparse",
    "macs",
    "macs_sparse",
    "latency",
    "latency_dense",
    "dense_top1",
    "epoch",
    "step",
    "val_top1",
    "val_loss",
    "train_loss",
    "sparsity",
    "lr",
    "allocation",
    "shares",
)


def _reason(said: Sequence[str]) -> str:
    """The line that names an error, or the last one. Ray puts advice below, or gives it alone."""
    lines = [line.strip() for line in said]
    named = next((line for line in reversed(lines) if _NAMED.match(line)), lines[-1])
    return _OUT_OF_MEMORY if named.startswith(_MEMORY_ADVICE) else named


def _last_words(trial: Trial) -> list[str]:
    """The last lines of what a failed trial wrote down."""
    name = trial.run_metadata.error_filename
    file = Path(trial.local_path or "", name or "")
    text = file.read_text(errors="replace") if name is not None and file.is_file() else ""
    lines = [line.rstrip() for line in text.splitlines() if line.strip()]
    return lines[-_TRACE_LINES:] or ["the trial failed without a word"]
