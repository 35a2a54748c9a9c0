"""What an allocation search decides: gradual runs cannot ask for something else, and no zeros come back."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
from image_tables import tiny

from orchestration.cluster.capacity import ClusterSize
from orchestration.preflight.allocation import check_allocated, check_sparsities
from orchestration.recipe.loading import load_recipe
from orchestration.recipe.schema import Recipe
from orchestration.recipe.validation import validate
from orchestration.state.trial_log import TrialRecord
from orchestration.sweep import gradual
from orchestration.sweep.artifacts import Allocated, Dense, Study
from orchestration.sweep.context import Sweep
from pruners.errors import InputError
from pruners.model.layers import find_layers
from trainers.config.data import DataSettings

SIZE = {"pareto": {"against": "size", "between": [0.55, 0.8], "tolerance": 0.05}}
FASTEST = {"objective": "latency", "between": [0.55, 0.8]}


def recipe(**changes: Any) -> Recipe:
    content = load_recipe("demo").model_dump(mode="json")
    for key, value in changes.items():
        content[key] = content[key] | value if isinstance(value, dict) else value
    return validate(content)


def swept(given: Recipe) -> Sweep:
    data = DataSettings(train="train.parquet")
    return Sweep(given, data, "data", ClusterSize(1.0, 0.0), MagicMock(), MagicMock(), run="run")


def allocated(sparsity: float) -> Allocated:
    metrics = {"sparsity": sparsity, "val_top1": 0.5, "allocation": {"a.weight": 7}}
    study = Study(TrialRecord(1, {"stage.0": 0.5}, "finished", 0.5, metrics), "one-shot", [])
    return Allocated({sparsity: study}, study)


@pytest.mark.parametrize("search", [SIZE, FASTEST], ids=["size", "latency"])
def test_allocation__gradual_runs_end_at_the_sparsity_that_was_chosen(
    search: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = MagicMock()
    monkeypatch.setattr(gradual, "_runs", runs)
    given = recipe(allocation={"sampler": "nsga2", **search})
    assert given.pruning.sparsity == 0.75
    gradual.schedule_phase(swept(given), "lamp", Dense("dense", 0.9, "w"), allocated(0.6125))
    sweep, phase, *_ = runs.call_args.args
    assert (phase, sweep.recipe.pruning.sparsity) == ("schedule", 0.6125)


def test_allocation__without_a_range_they_end_at_the_recipes(monkeypatch: pytest.MonkeyPatch) -> None:
    runs = MagicMock()
    monkeypatch.setattr(gradual, "_runs", runs)
    given = recipe(allocation={"pareto": {"against": "macs", "tolerance": 0.05}})
    gradual.schedule_phase(swept(given), "lamp", Dense("dense", 0.9, "w"), allocated(0.7501))
    assert runs.call_args.args[0].recipe.pruning.sparsity == 0.75


@pytest.mark.parametrize("searched", [True, False])
def test_allocation__the_final_row_is_of_the_sparsity_that_the_best_run_had(
    searched: bool, tmp_path: Path
) -> None:
    space = {"pruning.sparsity": {"uniform": [0.6, 0.9]}, "recovery.lr.peak": {"log": [1e-4, 1e-3]}}
    given = recipe(allocation={"trials": 0}, schedule={"space": space if searched else {}})
    values = {"pruning.sparsity": 0.82, "recovery.lr.peak": 2e-4} if searched else {}
    best = TrialRecord(0, values, "finished", 0.9, {"val_top1": 0.9}, checkpoint="there", run_id="run")
    runs = MagicMock(**{"register.return_value": "1"})
    registered = gradual.Gradual(swept(given), best, [best], str(tmp_path), runs).register()
    assert registered.sparsity == (0.82 if searched else 0.75)


@pytest.mark.parametrize(
    ("key", "distribution"),
    [
        ("pruning.sparsity", {"uniform": [0.6, 0.9]}),
        ("pruning.scope", {"choice": ["stage", "global"]}),
        ("pruning.floor", {"uniform": [0.0, 0.5]}),
        ("pruning.ceiling", {"uniform": [0.8, 1.0]}),
        ("pruning.table.attn", {"uniform": [0.5, 0.8]}),
        ("pruning.layers.QKV", {"choice": ["attn.qkv"]}),
        ("pruning.pattern", {"choice": ["unstructured", "1x4"]}),
        ("pruning.unfit", {"choice": ["refuse", "dense"]}),
    ],
)
def test_allocation__what_the_allocation_decides_cannot_be_searched_after_it(
    key: str, distribution: dict[str, Any]
) -> None:
    given = recipe(schedule={"space": {key: distribution}})
    with pytest.raises(InputError) as error:
        check_allocated(given)
    assert error.value.key == f"schedule.space.{key}"
    assert "decided by the allocation search" in str(error.value)
    assert "allocation.trials: 0" in str(error.value)
    check_allocated(recipe(schedule={"space": {key: distribution}}, allocation={"trials": 0}))


def test_allocation__nor_can_the_long_run_change_it() -> None:
    with pytest.raises(
        InputError, match=r"long_run = {'pruning\.scope': 'stage'}: pruning\.scope cannot change"
    ):
        recipe(long_run={"pruning.scope": "stage"})


def test_allocation__what_it_does_not_decide_can_be_searched() -> None:
    space = {
        "pruning.schedule.steps": {"integer": [1, 3]},
        "pruning.fisher.batch_size": {"integer": [8, 16]},
        "recovery.lr.peak": {"log": [1e-4, 1e-3]},
    }
    check_allocated(recipe(schedule={"space": space}, long_run={"recovery.epochs": 3}))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"pruning": {"sparsity": 0.4}}, r"pruning\.sparsity = 0\.4: .* more already: 0\.5000"),
        ({"allocation": {"sparsities": [0.3, 0.8]}}, r"allocation\.sparsities = 0\.3: .* more already"),
        (
            {"allocation": {"objective": "latency", "between": [0.2, 0.4]}},
            r"allocation\.between = \[0\.2, 0\.4\]: .* more already",
        ),
        (
            {
                "allocation": {"objective": "latency", "between": [0.8, 0.95]},
                "pruning": {"ceiling": {".*": 0.76}},
            },
            r"allocation\.between = \[0\.8, 0\.95\]: .* nearest feasible: 0\.7[56]",
        ),
        ({"pruning": {"sparsity": 0.5}}, None),
        ({"allocation": {"objective": "latency", "between": [0.2, 0.8]}}, None),
    ],
)
def test_allocation__a_sparse_checkpoint_keeps_its_zeros_or_is_refused(
    changes: dict[str, Any], says: str | None
) -> None:
    content = load_recipe("demo").model_dump(mode="json", exclude={"dense", "model", "name"})
    content |= {"name": "half", "model": {"checkpoint": "half", "classes": 3}}
    content["pruning"]["schedule"] = {"kind": "one_shot"}
    for key, values in changes.items():
        content[key] |= values
    model, _ = tiny()
    weights, layers = dict(model.named_parameters()), find_layers(model)
    with torch.no_grad():
        for layer in layers:
            weights[layer.name].view(-1)[: layer.numel // 2] = 0.0
    if says is None:
        check_sparsities(validate(content), model, layers)
        return
    with pytest.raises(InputError, match=says):
        check_sparsities(validate(content), model, layers)
