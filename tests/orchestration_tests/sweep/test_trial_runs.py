"""What MLflow is told of a trial of a population, by a tracker that only listens."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest

from orchestration.state.trial_log import TrialLog, TrialRecord
from orchestration.sweep import trial_runs
from orchestration.sweep.trial_runs import TrialRuns


def runs_on(tracker: MagicMock, folder: Path) -> TrialRuns:
    tracker.start.side_effect = ["phase", "run-0", "run-1"]
    log = TrialLog(f"{folder}/trials.json")
    return TrialRuns(tracker, MagicMock(), log, name="p", parent="sweep", params={}, tags={})


def epoch(number: int, run: str | None, loss: float) -> dict[str, Any]:
    """What is reported after an epoch of two steps."""
    figures = {"epoch": number, "step": 2 * number, "sparsity": 0.5, "val_top1": 1 - loss}
    losses = {"step_loss": [loss, loss], "step_lr": [0.1, 0.1]}
    return {**figures, **losses, **({"pbt": {"run": run}} if run else {})}


def logged(tracker: MagicMock) -> list[tuple[int, float]]:
    """Steps and accuracies."""
    return [call.args[1]["val_top1"][0] for call in tracker.metrics.call_args_list]


def test_trial_runs__a_trial_that_goes_back_is_listened_to_again(tmp_path: Path) -> None:
    tracker = MagicMock()
    runs = runs_on(tracker, tmp_path)
    runs.trial_started("a", 0, {"x": 1.0}, None)
    for number, run, loss in ((1, "r", 0.9), (2, "r", 0.8), (3, "r", 0.7), (2, "s", 0.4), (3, "s", 0.3)):
        runs.trial_reported("a", epoch(number, run, loss))
    steps = [step for step, _ in logged(tracker)]
    assert steps == [2, 4, 6, 4, 6]
    assert runs._schedules["a"] == [(2.0, 0.5), (4.0, 0.5), (6.0, 0.5)]
    assert [step for step, _ in runs._rates["a"]] == [0, 1, 2, 3, 4, 5]


def test_trial_runs__what_a_resumed_run_said_before_is_not_said_again(tmp_path: Path) -> None:
    tracker = MagicMock()
    tracker.last_step.return_value = 4
    runs = runs_on(tracker, tmp_path)
    for trial, run in (("a", "r"), ("b", None)):
        tracker.metrics.reset_mock()
        runs.trial_started(trial, 0, {"x": 1.0}, "before")
        for number in (2, 3):
            runs.trial_reported(trial, epoch(number, run, 0.5))
        assert [step for step, _ in logged(tracker)] == [6]


def test_trial_runs__the_tags_say_where_a_model_came_from(tmp_path: Path) -> None:
    tracker = MagicMock()
    runs = runs_on(tracker, tmp_path)
    taken = [{"trial": 1, "epoch": 3, "values": {"x": 2.0}}, {"trial": 4, "epoch": 5, "values": {"x": 3.0}}]
    for trial, history in (("a", {"pbt.exploits": 2, "pbt.taken": taken}), ("b", {})):
        runs.trial_started(trial, 0, {"x": 1.0}, None)
        runs.trial_ended(trial, TrialRecord(0, {"x": 2.5}, "stopped", 0.5, history))
    first, second = (call.args[1] for call in tracker.tags.call_args_list)
    assert first["pbt.exploits"] == "2"
    assert first["pbt.taken"] == "trial 1 after epoch 3, then trial 4 after epoch 5"
    assert json.loads(first["pbt.values"]) == {"x": 2.5}
    assert second == {"espalier.state": "stopped"}


def test_trial_runs__weights_that_never_arrived_are_logged_before_they_are_registered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kill in the middle of an upload leaves an artifact that is there, and has no weights."""
    tracker = MagicMock()
    uploaded = {"checkpoint", "checkpoint/config.json"}
    tracker.has.side_effect = lambda run, artifact: artifact in uploaded

    def folder(run: str, folder: Path, name: str, **options: Any) -> None:
        uploaded.update({f"{name}/{file.name}" for file in folder.iterdir()})

    tracker.folder.side_effect = folder
    registered = []

    def register(tracker: Any, model: str, run: str, tags: Any, artifact: str) -> str:
        registered.append(set(uploaded))
        return "1"

    monkeypatch.setattr(trial_runs.registry, "register", register)
    for name in ("model.safetensors", "config.json", "pruning.json"):
        (tmp_path / name).write_text("{}")
    runs = runs_on(tracker, tmp_path / "log")
    best = TrialRecord(0, {}, "finished", 0.5, run_id="run")
    assert runs.register("m", best, str(tmp_path)) == "1"
    assert {"checkpoint/model.safetensors", "checkpoint/pruning.json", "checkpoint/MLmodel"} <= registered[0]
    tracker.folder.reset_mock()
    runs.register("m", best, str(tmp_path))
    tracker.folder.assert_not_called()
