"""Observers of trials; a trial's record at its end, and the error message of a failed trial."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol, cast

from orchestration.state.trial_log import State, TrialLog, TrialMetrics, TrialRecord
from trainers.loop.report import (
    TRIAL_KEYS,
    EpochReport,
    Figures,
    KeptFigures,
    figures_of,
    recordable,
    without_not_finite,
)

_TRACE_LINES = 40
_NAMED = re.compile(r"[\w.]*(Error|Exception|Interrupt)\b.*: ")
_MEMORY_ADVICE = "Refer to the documentation on how to address the out of memory issue"
_OUT_OF_MEMORY = "killed by Ray's memory monitor, as the node ran low on memory"


class Observer(Protocol):
    """Is called when trials start, report and end; the display and the tracker are observers."""

    def trial_started(
        self, trial_id: str, number: int, values: dict[str, Any], before: str | None
    ) -> str | None:
        """Receive that a trial has started.

        Args:
            trial_id: Tune's name of the trial.
            number: its number in the log.
            values: the proposal, recipe keys and values.
            before: its run in the tracker before an interruption; ``None``: it had none.

        Returns:
            Its run in the tracker; ``None``: the observer has no tracker, or no run yet.
        """

    def trial_reported(self, trial_id: str, metrics: EpochReport) -> None: ...

    def trial_ended(self, trial_id: str, record: TrialRecord) -> str | None:
        """Receive that a trial has ended; return its run in the tracker, if there is one."""


def ended(
    number: int,
    values: Mapping[str, Any],
    state: State,
    last: EpochReport,
    *,
    seconds: float,
    error: Sequence[str] = (),
    cost: str | None = None,
) -> TrialRecord:
    """Make the record of a trial that has ended.

    Args:
        number: of the trial.
        values: the proposal, recipe keys and values.
        state: how it ended.
        last: its last report. The record of a finished trial has the figures of its best model at the final
            sparsity, any other record those of this report.
        seconds: duration of the trial.
        error: the last lines of a failed trial's trace (:func:`last_lines`).
        cost: key of a second objective, whose figure is kept too.

    Returns:
        The record, not yet in a log.
    """
    kept: Mapping[str, KeptFigures] = last.get("kept") or {}
    folder = last.get("kept_at")
    whole = state == "finished" and bool(kept)
    level = max(kept, key=float) if whole else ""
    figures: Figures = kept[level] if whole else last
    return TrialRecord(
        number=number,
        values=dict(values),
        state=state,
        score=figures.get("score"),
        metrics=cast(TrialMetrics, without_not_finite(figures_of(figures, (*TRIAL_KEYS, cost or "")))),
        checkpoint=f"{folder}/{level}" if whole and folder else None,
        kept={key: {"checkpoint": f"{folder}/{key}", **kept[key]} for key in kept} if whole else {},
        seconds=seconds,
        error=reason(error) if error else None,
        trace="\n".join(error) if error else None,
    )


def record_end(
    record: TrialRecord, last: EpochReport, log: TrialLog, observer: Observer, trial_id: str
) -> TrialRecord:
    """Note the end of a trial in the log, report it to the observer, and add the record to the log.

    If the driver is killed in between, the next driver reports what is missing (:func:`report_missing_ends`).

    Args:
        record: of the trial.
        last: its last report.
        log: of its phase.
        observer: to report the end to.
        trial_id: the observer's name for the trial.

    Returns:
        The record with its MLflow run and its position in the order of events.
    """
    log.end(record, recordable(last))
    run_id = observer.trial_ended(trial_id, record)
    return log.add(replace(record, run_id=run_id))


def report_missing_ends(log: TrialLog, observer: Observer) -> None:
    """Report to the observer the trials whose end a killed driver had noted in the log only."""
    for record, report, before in log.unreported:
        trial_id = f"ended-{record.number}"
        observer.trial_started(trial_id, record.number, record.values, before)
        if report:
            observer.trial_reported(trial_id, report)
        run_id = observer.trial_ended(trial_id, record)
        log.add(replace(record, run_id=run_id or before))


def reason(lines: Sequence[str]) -> str:
    """Find the line that names the error; if there is none, the last line.

    Ray may print advice after the error, or only advice.
    """
    lines = [line.strip() for line in lines]
    named = next((line for line in reversed(lines) if _NAMED.match(line)), lines[-1])
    return _OUT_OF_MEMORY if named.startswith(_MEMORY_ADVICE) else named


def last_lines(text: str) -> list[str]:
    """The last lines of a failed trial's trace."""
    lines = [line.rstrip() for line in text.splitlines() if line.strip()]
    return lines[-_TRACE_LINES:] or ["the trial failed without a word"]
