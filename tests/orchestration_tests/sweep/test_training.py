"""A training run without a search: its record, its failure, how it goes on; workers are stood in for."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray.train import WorkerGroupError

from orchestration.recipe.schema import Resources
from orchestration.search.training_trial import Reports
from orchestration.state.trial_log import TrialLog, TrialRecord
from orchestration.sweep import training
from orchestration.sweep.training import run_single

FIRST = {"step": 5, "epoch": 1, "val_top1": 0.5, "score": 0.5, "sparsity": 0.5}
WITHIN = {"step": 7}
KEPT = {"val_top1": 0.75, "score": 0.75, "sparsity": 0.75, "epoch": 2}
LAST = {"step": 10, "epoch": 2, "val_top1": 0.7, "score": 0.7, "kept": {"0.75": KEPT}, "kept_at": "kept"}


class Listener:
    """Hears of a run; an error of its own breaks the run off, as Ctrl-C does."""

    def __init__(self, error: type[BaseException] | None = None) -> None:
        self.heard: list[Any] = []
        self._error = error

    def trial_started(self, trial_id: str, number: int, values: Any, before: str | None) -> str:
        self.heard.append(("started", trial_id, number, values, before))
        return f"run-{number}"

    def trial_reported(self, trial_id: str, metrics: Any) -> None:
        self.heard.append(("reported", metrics["step"]))
        if self._error is not None:
            raise self._error

    def trial_ended(self, trial_id: str, record: TrialRecord) -> str:
        self.heard.append(("ended", record.state))
        return f"run-{record.number}"


class Workers:
    """Stands in for Ray Train: reports, then waits for a stop, fails or ends."""

    def __init__(
        self, reports: Sequence[Any], error: Exception | None = None, *, waits: bool = False
    ) -> None:
        self._reports, self._error, self._waits = reports, error, waits
        self.begun: list[tuple[str, str]] = []
        self.stopped = threading.Event()

    def train_run(
        self, job: Any, resources: Resources, storage: str, name: str, callback: Reports, *, pool: Any
    ) -> Workers:
        self._callback = callback
        self.begun.append((storage, name))
        return self

    def fit(self) -> None:
        for report in self._reports:
            self._callback.after_report(None, [report], None)
        if self._error is not None:
            raise self._error
        if self._waits:
            assert self.stopped.wait(10)

    def stop(self) -> None:
        self.stopped.set()


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Runs a job on stood-in workers; returns the log, as the next driver reads it."""

    def run(workers: Workers, listener: Listener) -> TrialLog:
        monkeypatch.setattr(training, "train_run", workers.train_run)
        log = TrialLog(f"{tmp_path}/trials.json")
        job: Any = SimpleNamespace(training=SimpleNamespace(epochs=2))
        with suppress(KeyboardInterrupt):
            run_single(job, Resources(), "runs", log, listener)
        return TrialLog(log.uri)

    return run


def test_run_single__a_whole_run_stands_for_the_best_model_that_it_kept(run: Any) -> None:
    workers, listener = Workers([FIRST, WITHIN, LAST]), Listener()
    (record,) = run(workers, listener).trials
    assert (record.state, record.score, record.checkpoint) == ("finished", 0.75, "kept/0.75")
    assert (record.number, record.values, record.run_id, record.error) == (0, {}, "run-0", None)
    ((_, name),) = workers.begun
    assert listener.heard == [
        ("started", name, 0, {}, None),
        ("reported", 5),
        ("reported", 10),
        ("ended", "finished"),
    ]


def test_run_single__a_run_that_the_log_has_is_not_begun(run: Any) -> None:
    run(Workers([LAST]), Listener())
    again, listener = Workers([LAST]), Listener()
    assert len(run(again, listener).trials) == 1
    assert (again.begun, listener.heard) == ([], [])


def test_run_single__a_failure_is_told_by_the_line_that_names_it_and_tried_again(run: Any) -> None:
    words = "Failure # 1\nValueError: batch 7 of layer blocks.0: not finite\n  at the end"
    log = run(Workers([FIRST], WorkerGroupError(words, {0: ValueError("x")})), Listener())
    (failed,) = log.trials
    assert (failed.state, failed.error) == ("failed", "ValueError: batch 7 of layer blocks.0: not finite")
    assert "Training failed due to worker errors" in str(failed.trace)
    with pytest.raises(RuntimeError, match="no trial ran to its end: ValueError: batch 7"):
        log.best()
    again = run(Workers([FIRST, LAST]), Listener())
    assert [(record.number, record.state) for record in again.trials] == [(0, "failed"), (1, "finished")]


def test_run_single__an_interrupted_run_is_stopped_and_goes_on_in_its_folder(run: Any) -> None:
    interrupted = Workers([FIRST], waits=True)
    log = run(interrupted, Listener(KeyboardInterrupt))
    assert interrupted.stopped.is_set()
    assert (log.trials, log.pending) == ([], [{}])
    on, listener = Workers([LAST]), Listener()
    assert [record.state for record in run(on, listener).trials] == ["finished"]
    assert on.begun == interrupted.begun
    assert listener.heard[0][-1] == "run-0", "the MLflow run that it had"
