"""The table that a sweep ends with: counts against the dense model, also where it was cut in width before."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest
from results import ROW
from rich.console import Console

from orchestration.recipe.loading import load_recipe
from orchestration.state.trial_log import TrialLog, TrialRecord
from orchestration.sweep import gradual, report
from orchestration.sweep.artifacts import Allocated, Dense, Results, Study
from orchestration.sweep.context import Sweep
from orchestration.sweep.report import _counts, make_rows, table
from trainers.checkpoint.folder import CONFIG, MASKS, PRUNING_RECORD, WEIGHTS
from trainers.config.data import DataSettings
from trainers.config.jobs import TrainJob

COSTS = {"parameters": 600, "parameters_sparse": 150, "macs": 6000, "macs_sparse": 1500}


def printed(*rows: Any) -> str:
    console = Console(width=200, record=True)
    console.print(table(rows))
    return console.export_text()


def test_report__counts_are_held_against_the_dense_model_that_all_began_with() -> None:
    step = {"dense_parameters": 1000, "dense_macs": 9000, "cut": {"mlp": [4, 3]}}
    counts = _counts({"costs": COSTS, "structured": step})
    assert counts == {
        "parameters": 1000,
        "structured_parameters": 600,
        "parameters_sparse": 150,
        "macs": 9000,
        "structured_macs": 6000,
        "macs_sparse": 1500,
    }


@pytest.mark.parametrize("record", [{"costs": COSTS}, {"costs": COSTS, "structured": None}])
def test_report__without_a_structured_step_nothing_changes(record: dict[str, Any]) -> None:
    assert _counts(record) == COSTS


def test_report__the_structured_model_has_a_column_where_there_is_one() -> None:
    assert "structured" not in printed(ROW)
    cut = replace(
        ROW,
        structured=0.875,
        parameters=2_000_000,
        structured_parameters=1_500_000,
        parameters_sparse=400_000,
    )
    text = printed(cut)
    assert "structured" in text
    assert "87.50 %" in text
    assert "2.00 M → 1.50 M → 400.00 k" in text


CHOSEN = 0.8123


def test_report__a_search_that_chooses_the_sparsity_has_one_row_at_that(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Gradual runs go to the sparsity that was chosen, and the row holds the one-shot model of it."""
    recipe = load_recipe(
        "demo",
        [
            "schedule.trials=1",
            "pruning.methods=[magnitude]",
            "allocation.pareto={between: [0.6, 0.95], tolerance: 0.05}",
            f"storage={tmp_path}",
        ],
    )
    jobs: list[TrainJob] = []

    def trained(sweep: Sweep, job: TrainJob, log: TrialLog, runs: Any, *, folder: str) -> None:
        assert job.pruning is not None
        jobs.append(job)
        checkpoint = Path(folder, "model")
        checkpoint.mkdir(parents=True)
        for name in (WEIGHTS, MASKS, CONFIG):
            (checkpoint / name).write_bytes(b"x" * 500_000)
        record = {"sparsity": job.pruning.sparsity, "costs": COSTS, "figures": {}}
        (checkpoint / PRUNING_RECORD).write_text(json.dumps(record))
        metrics: Any = {"val_top1": 0.875, "sparsity": job.pruning.sparsity, "epoch": 3}
        log.add(TrialRecord(0, {}, "finished", 0.875, metrics=metrics, checkpoint=str(checkpoint)))

    monkeypatch.setattr(gradual, "run_training", trained)
    monkeypatch.setattr(gradual, "classes_of", lambda *_: None)
    monkeypatch.setattr(Sweep, "runs", lambda *_, **__: MagicMock(register=lambda *_, **__: "7"))
    sweep = Sweep(
        recipe=recipe,
        data=DataSettings(train="/none", test="/none"),
        data_hash="d",
        size=MagicMock(),
        tracker=MagicMock(**{"link.return_value": "the run"}),
        display=MagicMock(),
        run="",
    )
    given: Any = {"sparsity": 0.775, "allocation": {}}
    searched: Any = {"sparsity": CHOSEN, "allocation": {"layers.0.blocks.0.attn.qkv.weight": 9}}
    own = TrialRecord(0, {"x": 0.775}, "finished", 0.5, metrics=given, given=True)
    best = TrialRecord(4, {"x": CHOSEN}, "finished", 0.6, metrics=searched)
    study = Study(best, "one-shot", [own, best])
    allocated = Allocated({study.sparsity: study}, study)
    dense = Dense("dense", 0.9, "w")

    recovered = gradual.schedule_phase(sweep, "magnitude", dense, allocated).register()
    top1 = {"dense": 0.9, "one-shot": 0.5625, recovered.end.checkpoint: 0.8125}
    monkeypatch.setattr(report, "_measure", lambda sweep, checkpoints, part: top1)
    results = Results(dense, None, {"magnitude": allocated}, {"magnitude": recovered})
    rows = make_rows(sweep, results)

    assert [job.pruning.sparsity for job in jobs if job.pruning is not None] == [CHOSEN]
    assert [job.allocation for job in jobs] == [searched["allocation"]]
    (line,) = [line for line in printed(*rows).splitlines() if "magnitude" in line]
    cells = [cell.strip() for cell in line.strip("│ ").split("│")]
    accuracies = ["90.00 %", "56.25 %", "81.25 %"]
    assert cells == [
        *("magnitude", "searched", *accuracies, "81.23 %", "600 → 150", "6.00 k → 1.50 k", "1.50 MB", "7")
    ]
