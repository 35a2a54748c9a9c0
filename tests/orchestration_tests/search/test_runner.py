"""A search that goes on: what a killed driver wrote down and nobody heard; and a kill for memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from ray.air.execution._internal.actor_manager import RayActorManager
from ray.exceptions import OutOfMemoryError, RayActorError

from orchestration.search.runner import run_search, treat_oom_as_actor_death
from orchestration.search.spec import Search
from orchestration.state.trial_log import TrialLog, TrialRecord
from trainers.loop.report import recordable

VALUES = {"recovery.ema": 0.9}
RECORD = TrialRecord(0, VALUES, "finished", 0.75, metrics={"val_top1": 0.75, "epoch": 2})
REPORT = {
    "epoch": 3,
    "step": 30,
    "val_top1": 0.5,
    "score": 0.5,
    "sparsity": 0.75,
    "step_loss": [1.0, 2.0],
    "kept": {"0.75": {"score": 0.75}},
    "trial_id": "of Tune",
}


class Listener:
    """Hears what is said of trials, in order."""

    def __init__(self) -> None:
        self.heard: list[tuple[str, Any]] = []

    def trial_started(self, trial_id: str, number: int, values: Any, before: str | None) -> str | None:
        self.heard.append(("started", (number, values, before)))
        return before

    def trial_reported(self, trial_id: str, metrics: Any) -> None:
        self.heard.append(("reported", dict(metrics)))

    def trial_ended(self, trial_id: str, record: TrialRecord) -> str | None:
        self.heard.append(("ended", record))
        return "run"


def test_run_search__an_end_that_only_the_log_knows_is_said_with_its_last_report(tmp_path: Path) -> None:
    """The record's figures are those of the best epoch, which need not be the last one."""
    uri = f"{tmp_path}/trials.json"
    killed = TrialLog(uri)
    killed.ask(0, VALUES, given=False)
    killed.begin(0, VALUES, "run")
    killed.end(RECORD, recordable(REPORT))

    listener, log = Listener(), TrialLog(uri)
    search = Search("a", None, {}, trials=1, concurrent=1, storage=str(tmp_path), seed=0)
    run_search(search, log, listener)
    assert listener.heard == [
        ("started", (0, VALUES, "run")),
        ("reported", {key: REPORT[key] for key in REPORT if key not in ("kept", "trial_id")}),
        ("ended", RECORD),
    ]
    assert [(record.number, record.run_id) for record in TrialLog(uri).trials] == [(0, "run")]
    assert TrialLog(uri).unreported == []


def test_run_search__an_end_without_any_report_is_said_alone(tmp_path: Path) -> None:
    killed = TrialLog(f"{tmp_path}/trials.json")
    killed.begin(0, VALUES, None)
    killed.end(TrialRecord(0, VALUES, "failed", None, error="boom"), {})
    listener, log = Listener(), TrialLog(f"{tmp_path}/trials.json")
    search = Search("a", None, {}, trials=0, concurrent=1, storage=str(tmp_path), seed=0)
    run_search(search, log, listener)
    assert [what for what, _ in listener.heard] == ["started", "ended"]


def test_recordable__series_with_a_loss_that_is_no_number_are_left_out() -> None:
    nan = float("nan")
    report = {"step": 2, "train_loss": nan, "step_loss": [1.0, nan], "step_lr": [0.1, 0.2]}
    assert recordable(report) == {"step": 2, "step_lr": [0.1, 0.2]}


def test_treat_oom_as_actor_death__a_kill_for_memory_is_the_death_of_an_actor(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[Exception] = []

    def decides(self: Any, tracked_actor_task: Any, exception: Exception) -> None:
        seen.append(exception)

    monkeypatch.setattr(RayActorManager, "_actor_task_failed", decides)
    treat_oom_as_actor_death()
    treat_oom_as_actor_death()  # wrapped once
    manager: Any = RayActorManager.__new__(RayActorManager)
    other = ValueError("another")
    low = OutOfMemoryError("low on memory\nmore")
    manager._actor_task_failed(tracked_actor_task=None, exception=low)  # as Ray calls it
    manager._actor_task_failed(tracked_actor_task=None, exception=other)
    assert isinstance(seen[0], RayActorError)
    assert str(seen[0]) == "low on memory"
    assert seen[1:] == [other]
