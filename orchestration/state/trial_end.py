"""Who hears of trials; the end of a trial: its record, how it is written down, the words of a failure."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol, cast

from orchestration.state.trial_log import State, TrialLog, TrialRecord
from trainers.loop.report import TRIAL_KEYS, EpochReport, figures_of, recordable

_TRACE_LINES = 40
_NAMED = re.compile(r"[\w.]*(Error|Exception|Interrupt)\b.*: ")
_MEMORY_ADVICE = "Refer to the documentation on how to address the out of memory issue"
_OUT_OF_MEMORY = "killed by Ray's memory monitor, as the node ran low on memory"


class Observer(Protocol):
    """Is called when trials start, report and end: the display and the tracker are such."""

    def trial_started(
        self, trial_id: str, number: int, values: dict[str, Any], before: str | None
    ) -> str | None:
        """Returns the trial's run in the tracker; ``before`` is the one it had when it was broken off."""

    def trial_reported(self, trial_id: str, metrics: EpochReport) -> None: ...

    def trial_ended(self, trial_id: str, record: TrialRecord) -> str | None:
        """Returns the trial's run in the tracker."""


def is_of_epoch(report: Mapping[str, Any]) -> bool:
    """Whether a report is of an epoch's end, or of a one-shot trial; others are of checkpoints within one."""
    return "step" not in report or "epoch" in report


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
    """The record of a trial.

    Args:
        number: of the trial.
        values: the proposal, recipe keys and values.
        state: how it ended.
        last: its last report. One that ran to its end stands for its best model at the final sparsity,
            another for where it was.
        seconds: it took.
        error: the lines of a failure (:func:`last_words`).
        cost: a second objective, whose figure is kept too.
    """
    kept: Mapping[str, Any] = last.get("kept") or {}
    folder = last.get("kept_at")
    whole = state == "finished" and bool(kept)
    level = max(kept, key=float) if whole else ""
    figures = cast(EpochReport, kept[level]) if whole else last
    return TrialRecord(
        number=number,
        values=dict(values),
        state=state,
        score=figures.get("score"),
        metrics=cast(EpochReport, figures_of(figures, (*TRIAL_KEYS, cost or ""))),
        checkpoint=f"{folder}/{level}" if whole and folder else None,
        kept={key: {"checkpoint": f"{folder}/{key}", **kept[key]} for key in kept} if whole else {},
        seconds=seconds,
        error=reason(error) if error else None,
        trace="\n".join(error) if error else None,
    )


def write_down(
    record: TrialRecord, last: EpochReport, log: TrialLog, observer: Observer, trial_id: str
) -> TrialRecord:
    """Note an end in the log, tell the observer, and add the record to the log's.

    Whatever is killed in between, the next driver says the rest (:func:`say_rest`).

    Args:
        record: of the trial.
        last: its last report.
        log: of its phase.
        observer: hears of the end.
        trial_id: by which the observer knows it.

    Returns:
        The record with its MLflow run and its place in the order.
    """
    log.end(record, recordable(last))
    run_id = observer.trial_ended(trial_id, record)
    return log.add(replace(record, run_id=run_id))


def say_rest(log: TrialLog, observer: Observer) -> None:
    """Tell the observer of the ends that a killed driver wrote down and nobody heard."""
    for record, report, before in log.unsaid:
        trial_id = f"ended-{record.number}"
        observer.trial_started(trial_id, record.number, record.values, before)
        if report:
            observer.trial_reported(trial_id, report)
        run_id = observer.trial_ended(trial_id, record)
        log.add(replace(record, run_id=run_id or before))


def reason(lines: Sequence[str]) -> str:
    """The line that names the error, else the last one: Ray may add advice below, or give advice alone."""
    lines = [line.strip() for line in lines]
    named = next((line for line in reversed(lines) if _NAMED.match(line)), lines[-1])
    return _OUT_OF_MEMORY if named.startswith(_MEMORY_ADVICE) else named


def last_words(text: str) -> list[str]:
    """The last lines of a failed trial's trace."""
    lines = [line.rstrip() for line in text.splitlines() if line.strip()]
    return lines[-_TRACE_LINES:] or ["the trial failed without a word"]
