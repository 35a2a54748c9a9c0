"""Cheap trials in MLflow: each is logged in one piece when it has ended; the search does not wait."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import replace
from typing import Any

from orchestration.state.trial_log import TrialRecord
from orchestration.sweep.trial_runs import SERIES, STATUS, TrialRuns
from orchestration.tracking.tracker import EndedRun, Tracker

_NUMBER = "espalier.number"


class CheapRuns(TrialRuns):
    """:class:`TrialRuns` whose trials have runs of their own only once they are over.

    The log and MLflow may differ where a driver was killed in between; at the start MLflow is told what the
    log has, and loses what it has not and what was left half said.
    """

    _trials_go_on = False  # one that is open was not said to its end, and is said anew

    def __init__(self, tracker: Tracker, *arguments: Any, **options: Any) -> None:
        super().__init__(tracker, *arguments, **options)
        self._ids: dict[int, Future[str]] = {}
        self._there = tracker.children(self.run, _NUMBER, {str(record.number) for record in self._log.trials})
        for record in self._log.trials:
            if str(record.number) not in self._there:
                self._say(record)

    def trial_started(self, trial_id: str, number: int, values: dict[str, Any], before: str | None) -> None:
        self._display.trial_started(trial_id, number, values)

    def trial_reported(self, trial_id: str, metrics: Mapping[str, Any]) -> None:
        self._display.trial_reported(trial_id, metrics)

    def trial_ended(self, trial_id: str, record: TrialRecord) -> None:
        self._display.trial_ended(trial_id, record)
        self._say(record)

    def close(self, best: TrialRecord) -> None:
        """The phase ends: the log learns which runs its trials have."""
        self._log.trials = [replace(one, run_id=self._run_of(one) or None) for one in self._log.trials]
        self._log.save()
        super().close(best)

    def _say(self, record: TrialRecord) -> None:
        found = record.metrics
        metrics = {key: found[key] for key in SERIES if key in found}
        metrics |= {f"sparsity.{key}": value for key, value in found.get("shares", {}).items()}
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
        return self._there.get(str(record.number), "") if sent is None else sent.result()
