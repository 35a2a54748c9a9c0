"""Cheap trials in MLflow after a driver was killed: as many as the log has, each once and as it ended."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console

from orchestration.reporting.display import Display
from orchestration.state.trial_log import TrialLog, TrialRecord
from orchestration.sweep.trial_runs import OneShotRuns
from orchestration.tracking.tracker import Tracker


def trial(number: int, state: str = "finished") -> TrialRecord:
    metrics = {"val_top1": number / 10, "val_loss": 1.0}
    return TrialRecord(number, {"stage.0": number / 10}, state, number / 10, metrics)  # type: ignore[arg-type]


@pytest.fixture
def uri(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path}/mlflow.db"


def opened(uri: str, log: TrialLog) -> tuple[Tracker, OneShotRuns]:
    """As a driver opens the runs of a search."""
    tracker, display = Tracker(uri, "tests"), Display(Console(file=io.StringIO()))
    runs = OneShotRuns(tracker, display, log, name="lamp-allocation", parent="0" * 32, params={}, tags={})
    return tracker, runs


def test_one_shot_runs__a_killed_driver_leaves_no_trial_out_and_none_half_said(
    uri: str, tmp_path: Path
) -> None:
    log = TrialLog(f"{tmp_path}/trials.json", one_shot=True)
    tracker, runs = opened(uri, log)
    for number, state in enumerate(("finished", "stopped", "failed", "finished")):
        log.add(trial(number, state))
    for record in log.trials[:3]:
        runs.trial_ended(str(record.number), record)
    tracker.flush()
    # the last one was on its way: there, with its figures, and not ended; another one is not in the log
    for number in (3, 4):
        tags = {"mlflow.parentRunId": runs.run, "espalier.number": str(number)}
        half = tracker.client.create_run(tracker.experiment, tags=tags).info.run_id
        tracker.client.log_metric(half, "val_top1", number / 10)

    again = TrialLog(log.uri, one_shot=True)
    assert again.run_id == runs.run
    tracker, runs = opened(uri, again)
    runs.close(again.best())
    below = f"tags.`mlflow.parentRunId` = '{runs.run}'"
    entries = tracker.client.search_runs([tracker.experiment], below)
    assert {one.data.tags["espalier.number"]: one.info.status for one in entries} == {
        "0": "FINISHED",
        "1": "KILLED",  # stopped early
        "2": "FAILED",
        "3": "FINISHED",
    }
    assert len(entries) == 4
    assert {one.run_id for one in TrialLog(log.uri, one_shot=True).trials} == {
        one.info.run_id for one in entries
    }
