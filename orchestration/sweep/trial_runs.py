"""A phase in MLflow: its run, a child run for each trial, their metrics and artifacts."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from matplotlib.figure import Figure

from orchestration.reporting import plots
from orchestration.reporting.display import Display
from orchestration.state.trial_log import TrialLog, TrialRecord
from orchestration.tracking import registry
from orchestration.tracking.pyfunc_model import MARK, model_files
from orchestration.tracking.tracker import EndedRun, Status, Tracker
from trainers import storage
from trainers.checkpoint.folder import PRUNING_RECORD, TRAINER_FILES
from trainers.loop.report import SERIES_KEYS, EpochReport, figures_of

STATUS: dict[str, Status] = {"finished": "FINISHED", "stopped": "KILLED", "failed": "FAILED"}


class TrialRuns:
    """An :class:`orchestration.state.trial_end.Observer` that logs to MLflow and shows progress.

    Args:
        parent: the sweep's run.
        params: what all trials of the phase share.
        done: the phase has ended before; its run is left as it is.
    """

    _trials_go_on = True  # interrupted trials resume, and keep their runs

    def __init__(
        self,
        tracker: Tracker,
        display: Display,
        log: TrialLog,
        *,
        name: str,
        parent: str,
        params: Mapping[str, Any],
        tags: Mapping[str, str],
        done: bool = False,
    ) -> None:
        self._tracker, self._display, self._log = tracker, display, log
        self._name, self._params, self._tags = name, dict(params), dict(tags)
        self._runs: dict[str, str] = {}
        self._known: dict[str, int] = {}  # by trial, the last step that MLflow has
        self._members: dict[str, str] = {}  # by trial, the Train run of its present member of a population
        self._schedules: dict[str, list[tuple[float, float]]] = {}
        self._rates: dict[str, list[tuple[float, float]]] = {}
        self._sweep = tags.get("espalier.sweep")
        resume = partial(tracker.resume, end_below=self._trials_go_on, parent=parent, sweep=self._sweep)
        go_on: Callable[[str], bool] = tracker.knows if done else resume
        self._left_alone = done
        if log.run_id is None or not go_on(log.run_id):
            log.run_id = tracker.start(name, parent, params, {**tags, "espalier.level": "phase"})
            log.save()
            self._left_alone = False
        self.run = log.run_id

    def trial_started(
        self, trial_id: str, number: int, values: dict[str, Any], before: str | None
    ) -> str | None:
        if before is not None and self._tracker.resume(before, parent=self.run, sweep=self._sweep):
            self._runs[trial_id] = before
            self._known[trial_id] = self._tracker.last_step(before, "val_top1")
        else:
            self._runs[trial_id] = self._start(number, values)
        self._display.trial_started(trial_id, number, values)
        return self._runs[trial_id]

    def trial_reported(self, trial_id: str, metrics: EpochReport) -> None:
        self._display.trial_reported(trial_id, metrics)
        step = int(metrics.get("step", 0))
        self._look_back(trial_id, step - len(metrics.get("step_loss", [])), metrics.get("pbt", {}).get("run"))
        if step <= self._known.get(trial_id, -1):  # sent before the interruption
            return
        self._known[trial_id] = step
        points = {key: [(step, value)] for key, value in figures_of(metrics, SERIES_KEYS).items()}
        losses, rates = metrics.get("step_loss", []), metrics.get("step_lr", [])
        first = step - len(losses)
        if losses:  # every step of the epoch, not its mean alone
            points["train_loss"] = [(first + i, value) for i, value in enumerate(losses)]
            points["lr"] = [(first + i, value) for i, value in enumerate(rates)]
            self._rates.setdefault(trial_id, []).extend(
                (float(first + i), value) for i, value in enumerate(rates)
            )
            self._schedules.setdefault(trial_id, []).append((float(step), metrics["sparsity"]))
        self._tracker.metrics(self._runs[trial_id], points)

    def _look_back(self, trial_id: str, first: int, member: str | None) -> None:
        """Forget the later steps of a trial that now continues from another trial's earlier checkpoint."""
        before = self._members.get(trial_id)
        if member is not None:
            self._members[trial_id] = member
        if before in (None, member):
            return
        self._known.pop(trial_id, None)
        ends, rates = self._schedules.get(trial_id, []), self._rates.get(trial_id, [])
        self._schedules[trial_id] = [(step, sparsity) for step, sparsity in ends if step <= first]
        self._rates[trial_id] = [(step, rate) for step, rate in rates if step < first]

    def trial_ended(self, trial_id: str, record: TrialRecord) -> str | None:
        self._display.trial_ended(trial_id, record)
        run = self._runs.pop(trial_id)
        if "shares" in record.metrics:
            shares = record.metrics["shares"].items()
            self._tracker.metrics(run, {f"sparsity.{key}": [(0, value)] for key, value in shares})
        if trial_id in self._schedules:
            points = self._schedules[trial_id]
            steps, sparsities = [x for x, _ in points], [y for _, y in points]
            if any(sparsities):
                figure = plots.schedule(steps, sparsities, self._rates[trial_id])
                self._tracker.figure(run, figure, "schedule")
        if record.state == "finished" and record.checkpoint is not None:
            with without_trainer_state(record.checkpoint) as folder:
                self._tracker.folder(run, folder, registry.ARTIFACT)
        tags = {"espalier.state": record.state} | ({"espalier.error": record.error} if record.error else {})
        tags |= _history(record)
        self._tracker.tags(run, tags)
        self._tracker.finish(run, STATUS[record.state])
        return run

    def figure(self, figure: Figure, name: str) -> None:
        """A figure of the whole phase."""
        self._tracker.figure(self.run, figure, name)

    def figures(self, figures: Mapping[str, Figure]) -> None:
        """Figures of the whole phase by their names."""
        for name, figure in figures.items():
            self.figure(figure, name)

    def register(
        self,
        model: str,
        best: TrialRecord,
        folder: str,
        name: str = registry.ARTIFACT,
        classes: Mapping[str, int] | None = None,
    ) -> str:
        """Register a checkpoint of the best trial as a version of ``model``; returns the version.

        Args:
            name: of the artifact; the trial's own is there already, others are logged now.
            classes: the label of each class by its name, if they are known.
        """
        run = best.run_id
        self._tracker.flush()
        missing = run is None or not self._tracker.knows(run)  # another MLflow than the sweep began with
        if run is None or missing:
            run = self._start(best.number, best.values)
        # the record is sent last: with it the artifact is complete
        if missing or not self._tracker.has(run, f"{name}/{PRUNING_RECORD}"):
            with storage.local_copy(folder) as local:
                self._tracker.folder(run, local, name)
            if missing:
                self._tracker.finish(run)
            self._tracker.flush()
        if not self._tracker.has(run, f"{name}/{MARK}"):
            with model_files(classes) as files:  # beside the checkpoint's: no weight is stored twice
                self._tracker.folder(run, files, name, marks=[MARK])
        record = storage.read_json(f"{folder}/pruning.json")
        return registry.register(self._tracker, model, run, registry.describe(record), name)

    def close(self, best: TrialRecord) -> None:
        """End the phase; its run gets the figures of the best trial."""
        if self._left_alone:
            return
        figures = {key: [(0, value)] for key, value in figures_of(best.metrics, SERIES_KEYS).items()}
        self._tracker.metrics(self.run, {f"best.{key}": points for key, points in figures.items()})
        self._tracker.tags(self.run, {"espalier.best": self._run_of(best)})
        self._tracker.finish(self.run)
        self._tracker.flush()

    def _run_of(self, record: TrialRecord) -> str:
        return record.run_id or ""

    def _title(self, number: int) -> str:
        """A trial's name in MLflow, whose columns show the beginning only."""
        return f"{number:03d} {self._name}"

    def _start(self, number: int, values: Mapping[str, Any]) -> str:
        tags = {**self._tags, "espalier.level": "trial"}
        return self._tracker.start(self._title(number), self.run, {**self._params, **values}, tags)


def _history(record: TrialRecord) -> dict[str, str]:
    """Tags of a population's member: its final values, and the trials that its weights came from."""
    if "pbt.taken" not in record.metrics:
        return {}
    taken = record.metrics["pbt.taken"]
    steps = [f"trial {step['trial']} after epoch {step['epoch']}" for step in taken]
    return {
        "pbt.exploits": str(len(taken)),
        "pbt.taken": ", then ".join(steps) or "nothing",
        "pbt.values": json.dumps(record.values),
    }


@contextmanager
def without_trainer_state(uri: str) -> Iterator[Path]:
    """A local copy of a checkpoint folder without the training state."""
    with TemporaryDirectory(prefix="espalier-") as target, storage.local_copy(uri) as source:
        for file in source.iterdir():
            if file.is_file() and not file.name.startswith(".") and file.name not in TRAINER_FILES:
                (Path(target) / file.name).write_bytes(file.read_bytes())
        yield Path(target)


_NUMBER = "espalier.number"


class OneShotRuns(TrialRuns):
    """:class:`TrialRuns` that logs a trial to MLflow only after it has ended.

    If a driver was killed, log and MLflow may differ: at the start, missing trials are sent and incomplete or
    unknown runs are deleted.
    """

    _trials_go_on = False  # open runs are incomplete: they are sent again

    def __init__(self, tracker: Tracker, *arguments: Any, **options: Any) -> None:
        super().__init__(tracker, *arguments, **options)
        self._ids: dict[int, Future[str]] = {}
        self._sent_before = tracker.children(
            self.run, _NUMBER, {str(record.number) for record in self._log.trials}
        )
        for record in self._log.trials:
            if str(record.number) not in self._sent_before:
                self._say(record)

    def trial_started(self, trial_id: str, number: int, values: dict[str, Any], before: str | None) -> None:
        self._display.trial_started(trial_id, number, values)

    def trial_reported(self, trial_id: str, metrics: EpochReport) -> None:
        self._display.trial_reported(trial_id, metrics)

    def trial_ended(self, trial_id: str, record: TrialRecord) -> None:
        self._display.trial_ended(trial_id, record)
        self._say(record)

    def close(self, best: TrialRecord) -> None:
        """End the phase, and write the MLflow run of each trial into the log."""
        self._log.trials = [
            replace(record, run_id=self._run_of(record) or None) for record in self._log.trials
        ]
        self._log.save()
        super().close(best)

    def _say(self, record: TrialRecord) -> None:
        metrics = figures_of(record.metrics, SERIES_KEYS)
        metrics |= {f"sparsity.{key}": value for key, value in record.metrics.get("shares", {}).items()}
        tags = {**self._tags, "espalier.level": "trial", "espalier.state": record.state}
        tags |= {_NUMBER: str(record.number)} | ({"espalier.error": record.error} if record.error else {})
        self._ids[record.number] = self._tracker.log(
            EndedRun(
                name=self._title(record.number),
                parent=self.run,
                params={**self._params, **record.values},
                metrics=metrics,
                tags=tags,
                status=STATUS[record.state],
                seconds=record.seconds,
            )
        )

    def _run_of(self, record: TrialRecord) -> str:
        sent = self._ids.get(record.number)
        return self._sent_before.get(str(record.number), "") if sent is None else sent.result()
