"""What a sweep makes of its models at the end, without a cluster."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import timm
import torch
from image_tables import normed_folder, table, write
from torch import nn

from orchestration.preflight.deploy import check_deployable
from orchestration.recipe.schema import Recipe
from orchestration.recipe.validation import validate
from orchestration.sweep import phases, tasks
from pruners import find_layers
from pruners.errors import InputError
from trainers import storage
from trainers.config.data import DataSettings
from trainers.deploy.formats import FORMATS


@pytest.fixture
def cnn(tmp_path: Path) -> Path:
    return normed_folder(tmp_path / "cnn")


def test_tasks__a_cnn_is_written_in_int8_by_ranges_from_training_images(
    cnn: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Dynamic INT8 would leave its convolutions in float32, which was refused when all else had been done."""
    monkeypatch.setattr(tasks, "_use_all_processors", lambda device: None)
    train = write(tmp_path / "train.parquet", table([0, 1, 2] * 12))
    target = f"{tmp_path}/int8"
    tasks.write_engine_file(
        tasks.EngineFileJob(str(cnn), target, "onnx-int8", DataSettings(train=train), seed=0, labels=None)
    )
    record = storage.read_json(f"{target}/export.json")
    assert record["calibration"] > 0
    assert record["int8_share"] > 0.6


def test_formats__images_are_taken_where_a_file_needs_them() -> None:
    with torch.device("meta"):
        cnn, vit = timm.create_model("resnet18"), timm.create_model("vit_tiny_patch16_224")
    assert [FORMATS["onnx-int8"].calibrates(model) for model in (cnn, vit)] == [True, False]
    assert [FORMATS["openvino-int8"].calibrates(model) for model in (cnn, vit)] == [True, True]
    assert [FORMATS["onnx"].calibrates(model) for model in (cnn, vit)] == [False, False]


def _recipe(**keys: Any) -> Recipe:
    model = {"architecture": "resnet18", "pretrained": True}
    content = {"name": "s", "model": model, "data": {"train": "train.parquet"}, **keys}
    return validate(content)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"quantize": {"mode": "dynamic"}}, r"quantize\.mode = 'dynamic': leaves convolutions in float32"),
        ({"export": ["sparse"]}, r"export = 'sparse': ResNet cannot be packed"),
    ],
)
def test_check_deployable__what_a_model_does_not_allow_is_refused(keys: dict[str, Any], message: str) -> None:
    with torch.device("meta"):
        model: nn.Module = timm.create_model("resnet18")
    with pytest.raises(InputError, match=message):
        check_deployable(_recipe(**keys), model, find_layers(model))


def test_phases__a_model_of_a_hub_is_looked_at_when_it_is_there(
    cnn: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is not known when the recipe is read; nothing may be pruned before it is refused."""
    monkeypatch.setattr(phases, "dense_phase", lambda sweep: SimpleNamespace(checkpoint=str(cnn)))
    monkeypatch.setattr(phases, "schedule_phase", lambda *_: pytest.fail("pruned"))
    monkeypatch.setattr(phases, "allocation_phase", lambda *_: pytest.fail("pruned"))
    recipe = _recipe(model={"checkpoint": "hf-hub:me/resnet", "classes": 3}, export=["sparse"])
    sweep: Any = SimpleNamespace(recipe=recipe, phase_range=SimpleNamespace(reaches=lambda phase: True))
    with pytest.raises(InputError, match="export = 'sparse': ResNet cannot be packed"):
        phases._results(sweep)
