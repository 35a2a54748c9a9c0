"""The structured step without a cluster: what its tasks write, and a recovery that was broken off."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from image_tables import SWIN, dense_folder
from training_runs import CPU, Log, make_files, same_files

from orchestration.recipe.jobs import gradual_job, structured_job
from orchestration.recipe.schema import Recipe
from orchestration.recipe.validation import validate
from orchestration.sweep import tasks
from orchestration.tracking.registry import describe
from pruners.errors import InputError
from trainers.checkpoint.folder import load_checkpoint
from trainers.config.data import DataSettings
from trainers.config.jobs import TrainJob
from trainers.config.structured import StructuredSettings
from trainers.loop.gradual import run

LINEAGE: dict[str, Any] = {"method": "structured", "parent": "1234", "structured": {"dense": "1234"}}
TRAINING: dict[str, Any] = {
    "epochs": 4,
    "batch_size": 8,
    "checkpoint_every": 2,
    "distill": {"teacher": "dense"},
    "augment": {"shift": 1},
}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return make_files(tmp_path_factory.mktemp("files"))


def data(files: dict[str, str]) -> DataSettings:
    return DataSettings(train=files["train"], validation=files["validation"])


def save(files: dict[str, str], dense: str, target: Path, **widths: Any) -> str:
    settings = StructuredSettings.model_validate({"images": 20, "batch_size": 4, **widths})
    lineage = dict(LINEAGE)
    tasks.save_structured(dense, settings, data(files), str(target), seed=0, lineage=lineage, device="cpu")
    return str(target)


@pytest.fixture(scope="module")
def cut(files: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> str:
    return save(files, files["dense"], tmp_path_factory.mktemp("cut") / "cut", embed=0.75, mlp=0.5)


def recipe(files: dict[str, str], **more: Any) -> Recipe:
    return validate(
        {
            "name": "tiny",
            "seed": 4,
            "model": {"checkpoint": files["dense"], "classes": 3},
            "data": {key: files[key] for key in ("train", "validation")},
            "structured": {"embed": 0.75, "mlp": 0.5, "recovery": TRAINING},
            "pruning": {"methods": ["magnitude"], "sparsity": 0.5, "schedule": {"kind": "one_shot"}},
            "recovery": {"epochs": 4, "batch_size": 8},
            **more,
        }
    )


def job(files: dict[str, str], cut: str) -> TrainJob:
    record = json.loads(Path(cut, "pruning.json").read_text())
    lineage = {**LINEAGE, "structured": record["structured"]}
    return structured_job(recipe(files), data(files), cut=cut, dense=files["dense"], lineage=lineage)


def test_structured__a_cut_tells_what_it_was_before(cut: str) -> None:
    record = json.loads(Path(cut, "pruning.json").read_text())
    assert record["method"] == "structured"
    assert record["parent"] == "1234"
    step = record["structured"]
    assert step["cut"] == {"embed": [16, 12], "head_dim": [8, 6], "mlp": [64, 32]}
    assert (step["importance"], step["images"], step["dense"]) == ("taylor", 20, "1234")
    assert step["dense_parameters"] > record["costs"]["parameters"]
    assert step["dense_macs"] > record["costs"]["macs"]
    assert load_checkpoint(cut).model.get_parameter("head.weight").shape == (3, 12)


def test_structured__a_swin_of_a_folder(files: dict[str, str], tmp_path: Path) -> None:
    dense = dense_folder(tmp_path / "dense", SWIN)
    folder = save(files, str(dense), tmp_path / "cut", heads=[1, 2], importance="magnitude")
    record = json.loads(Path(folder, "pruning.json").read_text())
    assert record["structured"]["images"] == 0
    assert load_checkpoint(folder).model.get_submodule("layers.0.blocks.0.attn").num_heads == 1


def test_structured__a_shape_that_timm_cannot_hold_is_refused_when_the_model_is_here(
    files: dict[str, str], tmp_path: Path
) -> None:
    """A hub's model is known only then."""
    with pytest.raises(InputError, match="cannot be divided by 2 heads"):
        save(files, files["dense"], tmp_path / "cut", embed=13)
    assert not (tmp_path / "cut").exists()


def test_structured__recovery_learns_from_the_uncut_model(files: dict[str, str], cut: str) -> None:
    made = job(files, cut)
    assert made.model.checkpoint == cut
    assert made.training.distill is not None
    assert made.training.distill.teacher == files["dense"]
    other = recipe(files, structured={"mlp": 0.5, "recovery": {"distill": {"teacher": "resnet18"}}})
    made = structured_job(other, data(files), cut=cut, dense=files["dense"], lineage={})
    assert made.training.distill is not None
    assert made.training.distill.teacher == "resnet18"


def test_structured__a_recovery_that_was_broken_off_ends_bit_for_bit_the_same(
    files: dict[str, str], cut: str, tmp_path: Path
) -> None:
    made = job(files, cut)
    whole = Log(tmp_path / "whole")
    run(made, whole, CPU)
    again = Log(tmp_path / "again")
    first = min(whole.saved)
    assert first < max(whole.saved)
    run(made, again, CPU, resume=whole.saved[first])
    assert same_files(whole.last, again.last) == []
    record = json.loads((whole.last / "pruning.json").read_text())
    assert record["method"] == "structured"
    assert record["structured"]["cut"]["mlp"] == [64, 32]
    trained, before = (load_checkpoint(str(one)).model for one in (whole.last, cut))
    assert not torch.equal(trained.get_parameter("head.weight"), before.get_parameter("head.weight"))


def test_structured__what_is_pruned_afterwards_tells_of_both_steps(
    files: dict[str, str], cut: str, tmp_path: Path
) -> None:
    step = json.loads(Path(cut, "pruning.json").read_text())["structured"]
    job = gradual_job(
        {},
        recipe=recipe(files),
        method="magnitude",
        data=data(files),
        checkpoint=cut,
        allocation=None,
        lineage={"parent": "5678", "structured": step},
    )
    log = Log(tmp_path / "pruned")
    run(job, log, CPU)
    record = json.loads((log.last / "pruning.json").read_text())
    assert record["sparsity"] == pytest.approx(0.5, abs=0.01)
    assert record["structured"] == step
    tags = describe(record)
    assert tags["structured"] == "embed 16 → 12, head_dim 8 → 6, mlp 64 → 32"
    assert tags["dense"] == "5678"
    assert tags["method"] == "magnitude"
