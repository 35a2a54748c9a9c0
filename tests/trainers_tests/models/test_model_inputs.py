"""What a model takes: images of the size it was built for, in RGB, of two classes or more; batch norms."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from commands import Run
from helpers import lone_layer, tiny_vit
from image_tables import VIT, VIT_ARGS, normed_folder, table, tiny, write
from pydantic import ValidationError
from torch import nn
from training_runs import CPU, Log, make_files, make_job

import pruners
from pruners.elimination.fisher import BlockFisher
from pruners.errors import InputError
from trainers.checkpoint.folder import load_checkpoint, save_checkpoint
from trainers.config.data import ModelSettings
from trainers.data.sampler import EpochBatches
from trainers.loop.gradual import run as train
from trainers.loop.train_step import _parts
from trainers.models import factory


@pytest.fixture
def files(tmp_path: Path) -> Path:
    return tmp_path


@pytest.fixture
def pretrained(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """timm's own weights of a small ViT for images of 16 by 16, from a file instead of the net."""
    weights = tmp_path / "weights.pth"
    torch.save(tiny(VIT)[0].state_dict(), weights)
    original = timm.create_model

    def create_model(name: str, **arguments: Any) -> nn.Module:
        known = {"file": str(weights), "num_classes": 3, "input_size": (3, 16, 16), "crop_pct": 0.9}
        overlay = known | (arguments.pop("pretrained_cfg_overlay", None) or {})
        return original(name, pretrained_cfg_overlay=overlay, **arguments)

    monkeypatch.setattr(timm, "create_model", create_model)


@pytest.mark.usefixtures("pretrained")
def test_model_inputs__another_size_than_that_of_the_pretrained_weights(tmp_path: Path) -> None:
    """timm resamples the position embeddings, and leaves its preprocessing as it was."""
    args = VIT_ARGS | {"img_size": 32}
    settings = ModelSettings(architecture=VIT, pretrained=True, classes=3, args=args)
    model = factory.build_model(settings)
    assert factory.input_size(model) == (3, 32, 32)
    assert factory.data_config(model)["crop_pct"] == 0.9  # of the pretrained weights
    assert model(torch.zeros(1, *factory.input_size(model))).shape == (1, 3)
    save_checkpoint(tmp_path / "saved", model, model_args=args, masks=None, record={})
    plain = timm.models.create_model(f"local-dir:{tmp_path / 'saved'}", pretrained=True)
    assert plain.pretrained_cfg["input_size"] == (3, 32, 32)


def test_model_inputs__a_folder_whose_configuration_says_another_size(tmp_path: Path) -> None:
    """As earlier versions and timm itself write it."""
    model = timm.create_model(VIT, num_classes=3, **VIT_ARGS)
    assert model.pretrained_cfg["input_size"] == (3, 224, 224)
    save_checkpoint(tmp_path, model, model_args=VIT_ARGS, masks=None, record={})
    loaded = load_checkpoint(str(tmp_path)).model
    assert factory.input_size(loaded) == (3, 16, 16)


def test_model_inputs__one_class_is_refused(run: Run) -> None:
    with pytest.raises(ValidationError, match="greater than or equal to 2"):
        ModelSettings(architecture=VIT, classes=1)
    status, _, error = run("sweep demo --dry-run model.classes=1")
    assert (status, error.count("\n")) == (2, 1)
    assert "model.classes = 1" in error


def test_model_inputs__channels_that_no_picture_has(run: Run) -> None:
    status, _, error = run("sweep demo --dry-run model.args.in_chans=1")
    assert (status, error.count("\n")) == (2, 1)
    assert "in_chans must be 3" in error


@pytest.mark.parametrize(("classes", "channels"), [(1, 3), (3, 1)])
def test_model_inputs__a_checkpoint_for_other_pictures(
    classes: int, channels: int, run: Run, tmp_path: Path
) -> None:
    args = VIT_ARGS | {"in_chans": channels}
    model = timm.create_model(VIT, num_classes=classes, **args)
    save_checkpoint(tmp_path / "model", model, model_args=args, masks=None, record={})
    data = write(tmp_path / "data.parquet", table([0] * 4))
    for command in (
        f"evaluate model --data {data}",
        f"finetune model --train {data} --out new epochs=1",
        f"prune model --method ovit --sparsity 0.5 --data {data} --out new",
    ):
        status, _, error = run(command)
        assert (status, error.count("\n")) == (2, 1), command
        assert f"{classes} classes and {channels} channels" in error


def test_model_inputs__a_fisher_of_zeros_says_nothing() -> None:
    """Of one class the loss is always 0: every order would be magnitude's, under another name."""
    model = tiny_vit()
    model.head = nn.Linear(8, 1)
    batches = [(torch.randn(4, 3, 32, 32), torch.zeros(4, dtype=torch.int64))] * 2
    with pytest.raises(InputError, match=r"gradient.*zero in every layer"):
        pruners.prune(model, "ovit", 0.5, batches=batches)
    fisher = BlockFisher([lone_layer(2, 4), lone_layer(2, 4, name="b.weight")])
    assert not fisher.blank
    zero = {"a.weight": torch.zeros(2, 4), "b.weight": torch.zeros(2, 4)}
    fisher.add(zero)
    fisher.flush()
    assert fisher.blank
    fisher.add(zero | {"b.weight": torch.full((2, 4), 1e-3)})  # one layer that learns is enough
    fisher.flush()
    assert not fisher.blank


def test_model_inputs__batch_norms_never_see_one_image(tmp_path: Path) -> None:
    """57 images by 8 would leave one to the last batch, and 8 in 5 parts would be some of one."""
    files = make_files(tmp_path, images=57)
    model = {"checkpoint": str(normed_folder(tmp_path / "normed")), "classes": 3}
    log = Log(tmp_path / "log")
    train(make_job(files, {"epochs": 2, "accumulate": 5}, model=model), log, CPU)
    assert [row["step"] for row in log.metrics] == [7, 14]
    plain = Log(tmp_path / "plain")
    train(make_job(files, {"epochs": 1}), plain, CPU)
    assert plain.metrics[0]["step"] == 8  # without batch norms every image is seen


@pytest.mark.parametrize("world", [1, 2, 3])
def test_model_inputs__a_worker_has_two_images_in_each_step(world: int) -> None:
    samplers = [EpochBatches(33, 8, rank=rank, world=world, normed=True) for rank in range(world)]
    assert [len(sampler) for sampler in samplers] == [4] * world  # the same for any number of workers
    assert all(len(batch) >= 2 for sampler in samplers for batch in sampler)
    assert len(EpochBatches(7, 8, normed=True)) == 1  # all there are
    with pytest.raises(
        InputError, match=r"batch_size = 5.*at least two for each of 3 workers, as the model has"
    ):
        EpochBatches(33, 5, world=3, normed=True)
    with pytest.raises(InputError, match="1 images"):
        EpochBatches(1, 8, normed=True)


def test_model_inputs__parts_differ_by_one_image_at_most() -> None:
    images, labels = torch.arange(7), torch.arange(7)
    parts = [(part.tolist(), last) for part, _, last in _parts(images, labels, 3)]
    assert parts == [([0, 1, 2], False), ([3, 4], False), ([5, 6], True)]
