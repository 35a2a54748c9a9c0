"""Gradual runs with the pruning settings that change what a step does: patterns, tables, limits, λ."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from image_tables import VIT, dense_folder, table, write
from patterns import zeros_in_groups
from torch import Tensor

from pruners import METHODS, InputError, create_pruner, prune
from pruners.elimination.damping import LADDER
from trainers.checkpoint.folder import load_checkpoint
from trainers.config.jobs import TrainJob
from trainers.data.datasets import fixed_batches
from trainers.loop.gradual import Progress, _prune, run
from trainers.loop.session import Session

FISHER = {"gradients": 3, "batch_size": 4, "block_size": 16, "damp": 1e-4}


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A dense checkpoint, and images."""
    folder = tmp_path_factory.mktemp("gradual")
    train = write(folder / "train.parquet", table([i % 3 for i in range(32)]))
    validation = write(folder / "validation.parquet", table([i % 3 for i in range(9)], first=100))
    return {
        "model": {"checkpoint": str(dense_folder(folder / "dense", VIT)), "classes": 3},
        "data": {"train": train, "validation": validation},
    }


def ran(
    given: dict[str, Any], folder: Path, method: str, **pruning: Any
) -> tuple[list[dict[str, Any]], dict[str, Tensor]]:
    """The metrics of three epochs (a step at the first two), and the weights in the end."""
    settings = {"schedule": {"start": 0.4, "steps": 2, "last_at": 0.4}, "fisher": FISHER, **pruning}
    training = {"epochs": 3, "batch_size": 8, "checkpoint_every": 3}
    job = TrainJob.model_validate(
        {"name": "tiny", "seed": 4, **given, "training": training, "pruning": settings, "method": method}
    )
    metrics: list[dict[str, Any]] = []

    def report(progress: Progress) -> None:
        metrics.append(dict(progress.metrics))
        if progress.save is not None:
            progress.save(folder / "saved")

    run(job, report, torch.device("cpu"))
    loaded = load_checkpoint(str(folder / "saved"))
    return metrics, {name: loaded.model.get_parameter(name).detach() for name in loaded.masks}


def shares(weights: dict[str, Tensor]) -> dict[str, float]:
    return {name: int((weight == 0).sum()) / weight.numel() for name, weight in weights.items()}


@pytest.mark.parametrize("method", METHODS)
def test_gradual_pruning__every_method_meets_the_target_to_the_weight(
    method: str, given: dict[str, Any], tmp_path: Path
) -> None:
    metrics, weights = ran(given, tmp_path, method, sparsity=0.7)
    numel = sum(weight.numel() for weight in weights.values())
    expected = [round(share * numel) / numel for share in (0.4, 0.7, 0.7)]
    assert [row["sparsity"] for row in metrics] == pytest.approx(expected)
    assert sum(int((weight == 0).sum()) for weight in weights.values()) == round(0.7 * numel)
    assert not any("damp" in key for row in metrics for key in row)


@pytest.mark.parametrize("pattern", ["2:4", "4:8", "1x4"])
@pytest.mark.parametrize("method", ["lamp", "ovit"])
def test_gradual_pruning__a_pattern_holds_in_every_group_after_training(
    method: str, pattern: str, given: dict[str, Any], tmp_path: Path
) -> None:
    metrics, weights = ran(given, tmp_path, method, sparsity=0.5, pattern=pattern)
    assert [row["sparsity"] for row in metrics] == pytest.approx([0.4, 0.5, 0.5], abs=1e-3)
    for weight in weights.values():
        counts = zeros_in_groups(weight == 0, 8 if pattern == "4:8" else 4)
        if pattern == "1x4":
            assert set(counts.unique().tolist()) == {0, 4}
        else:
            assert (counts == (4 if pattern == "4:8" else 2)).all()


def test_gradual_pruning__a_table_is_met_in_every_layer(given: dict[str, Any], tmp_path: Path) -> None:
    sparsities = {r"attn\..*": 0.25, r"mlp\.fc\d": 0.75}
    total = (16 * 64 * 0.25 + 16 * 128 * 0.75) / (16 * 64 + 16 * 128)
    _, weights = ran(given, tmp_path, "ovit", sparsity=total, table=sparsities)
    assert shares(weights) == {name: 0.25 if "attn" in name else 0.75 for name in weights}


def test_gradual_pruning__floors_and_ceilings_by_name_hold_in_every_layer(
    given: dict[str, Any], tmp_path: Path
) -> None:
    limits = {"floor": {r"attn\.qkv": 0.75}, "ceiling": {r"mlp\.fc1": 0.5}}
    _, weights = ran(given, tmp_path, "ovit", sparsity=0.6, scope="global", **limits)
    _, without = ran(given, tmp_path / "without", "ovit", sparsity=0.6, scope="global")
    for kind, low, high in (("qkv", 0.75, 1.0), ("fc1", 0.0, 0.5)):
        pruned_shares, free = (
            [v for k, v in shares(weights_of).items() if kind in k] for weights_of in (weights, without)
        )
        assert all(low <= share <= high for share in pruned_shares)
        assert not all(low <= share <= high for share in free)


def test_gradual_pruning__damp_auto_is_chosen_anew_at_every_step_and_reported(
    given: dict[str, Any], tmp_path: Path
) -> None:
    metrics, _ = ran(given, tmp_path, "ovit", sparsity=0.7, fisher={**FISHER, "damp": "auto"})
    curves = [{damp: row[f"damp_loss_{damp:g}"] for damp in LADDER} for row in metrics[:2]]
    assert [row["damp"] for row in metrics[:2]] == [min(curve, key=curve.__getitem__) for curve in curves]
    assert curves[0] != curves[1]
    assert "damp" not in metrics[2]


def test_gradual_pruning__a_pattern_that_does_not_fit_names_the_layer(
    given: dict[str, Any], tmp_path: Path
) -> None:
    with pytest.raises(
        InputError, match=r"1x24.*cannot fit blocks\.0\.attn\.qkv\.weight, which has 16 inputs"
    ):
        ran(given, tmp_path, "ovit", sparsity=0.5, pattern="1x24")


def test_gradual_pruning__a_step_in_rounds_with_reconstruction_is_what_prune_does(
    given: dict[str, Any], tmp_path: Path
) -> None:
    """At the first step of a run its weights are the dense model's."""
    fisher = {**FISHER, "gradients": 6, "rounds": [0.5, 0.8]}
    job = TrainJob.model_validate(
        {
            "name": "tiny",
            "seed": 4,
            **given,
            "training": {"epochs": 1, "batch_size": 8},
            "pruning": {
                "sparsity": 0.8,
                "schedule": {"kind": "one_shot"},
                "fisher": fisher,
                "reconstruct": 10,
            },
            "method": "ovit",
        }
    )
    session = Session.open(job, torch.device("cpu"))
    stepped, model = session.model, copy.deepcopy(session.model)
    _prune(session, 0.8)
    pruner = create_pruner("ovit", block_size=16, damp=1e-4, gradients=6)
    batches = list(fixed_batches(session.images, 4, 0, 6, rank=0, world=1, seed=4))
    report = prune(model.eval(), pruner, 0.8, batches=batches, rounds=[0.5, 0.8], reconstruct=10)
    assert session.layer_masks.fingerprint() == report.masks.fingerprint()
    expected = model.state_dict()
    for name, value in stepped.state_dict().items():
        torch.testing.assert_close(value, expected[name], rtol=1e-3, atol=1e-4)
    facts = session.metrics.facts
    assert 0 < facts["layer_error"] < facts["layer_error_before"]
