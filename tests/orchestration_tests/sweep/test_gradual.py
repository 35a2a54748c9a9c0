"""The order in which a phase of gradual runs writes down that it is done."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from orchestration.recipe.loading import load_recipe
from orchestration.state.trial_log import TrialLog, TrialRecord
from orchestration.sweep import gradual


def test_gradual__mlflow_has_all_before_the_model_says_that_the_phase_is_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed in between, a sweep ends the phase's run when it is resumed; else nobody would."""
    checkpoint = tmp_path / "kept" / "0.75"
    checkpoint.mkdir(parents=True)
    (checkpoint / "pruning.json").write_text("{}")
    metrics = {"val_top1": 0.5, "sparsity": 0.75, "epoch": 3}
    end = TrialRecord(0, {}, "finished", 0.5, metrics=metrics, checkpoint=str(checkpoint))

    def trained(sweep: Any, job: Any, log: TrialLog, runs: Any, *, folder: str) -> None:
        log.add(end)

    def recovered() -> list[Path]:
        return list(tmp_path.glob("sweep/schedule-lamp-*/recovered/pruning.json"))

    counts: list[int] = []

    def silent(*_: Any, **__: Any) -> None: ...

    runs = SimpleNamespace(figure=silent, figures=silent, close=lambda best: counts.append(len(recovered())))
    sweep: Any = SimpleNamespace(
        recipe=load_recipe("demo", ["schedule.trials=1"]),
        root=str(tmp_path / "sweep"),
        data=None,
        data_hash="",
        lineage={},
        display=SimpleNamespace(phase=silent, finished=silent),
        begin=silent,
        runs=lambda *_, **__: runs,
        scratch=lambda name: nullcontext(""),
    )
    dense: Any = SimpleNamespace(weights="", version=None, checkpoint="", top1=0.6)
    monkeypatch.setattr(gradual, "gradual_job", silent)
    monkeypatch.setattr(gradual, "run_training", trained)
    assert gradual._runs(sweep, "schedule", "lamp", dense, None).best.number == end.number
    assert counts == [0]
    assert len(recovered()) == 1
    gradual._runs(sweep, "schedule", "lamp", dense, None)  # known
    assert counts == [0, 1]
