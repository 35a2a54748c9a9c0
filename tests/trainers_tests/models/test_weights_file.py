"""Files of weights as training scripts leave them: read without their code, loaded as timm loads its own."""

from __future__ import annotations

import argparse
import json
import sys
import types
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from image_tables import SWIN, SWIN_ARGS, VIT, VIT_ARGS, dense_folder, edit_json, images, table, tiny, write
from safetensors.torch import save_file
from torch import Tensor, nn

from orchestration.commands.import_weights import import_weights
from orchestration.preflight.checks import prepare
from orchestration.recipe.loading import load_recipe
from orchestration.sweep.tasks import save_pretrained
from pruners.errors import InputError
from trainers.checkpoint.folder import load_checkpoint, save_checkpoint
from trainers.config.data import DataSettings, ModelSettings
from trainers.models.transformers_names import counterpart
from trainers.models.weights_file import load_weights

State = Mapping[str, Tensor]


def prefixed(state: State, prefix: str) -> dict[str, Tensor]:
    return {f"{prefix}{name}": value for name, value in state.items()}


def state(seed: int = 0, architecture: str = VIT) -> dict[str, Tensor]:
    return dict(tiny(architecture, seed=seed)[0].state_dict())


def saved(path: Path, content: Any) -> str:
    torch.save(content, path)
    return str(path)


def check_same(model: nn.Module, seed: int = 0, architecture: str = VIT) -> None:
    """Whether a model answers as the tiny one of this seed does."""
    with torch.no_grad():
        expected = tiny(architecture, seed=seed)[0](images(2))
        assert torch.equal(model.eval()(images(2)), expected)


def of_timm(**settings: Any) -> dict[str, Any]:
    """What timm's train.py keeps: the average, the settings in a Namespace, numpy's numbers."""
    return {
        "epoch": 3,
        "arch": VIT,
        "state_dict": OrderedDict(prefixed(state(0), "module.")),
        "state_dict_ema": state(1),
        "optimizer": {"state": {0: {"step": torch.tensor(3.0)}}, "param_groups": [{"lr": 0.1}]},
        "version": 2,
        "args": argparse.Namespace(model=VIT, mean=[0.1, 0.2, 0.3], crop_pct=None, **settings),
        "metric": np.float64(71.5),
    }


def test_weights_file__timms_own_with_the_average_unless_it_is_not_wanted(tmp_path: Path) -> None:
    file = saved(tmp_path / "best.pth.tar", of_timm(model_kwargs=VIT_ARGS))
    model, chosen = load_weights(file)  # architecture and arguments are in it
    check_same(model, seed=1)
    assert chosen == "state_dict_ema"
    assert model.pretrained_cfg["mean"] == (0.1, 0.2, 0.3)
    assert "state_dict" not in model.pretrained_cfg
    model, chosen = load_weights(file, average=False)
    check_same(model, seed=0)
    assert chosen == "state_dict"


@pytest.mark.parametrize(
    ("content", "chosen"),
    [
        (state(), ""),
        (prefixed(state(), "module."), ""),
        (prefixed(state(), "_orig_mod."), ""),
        (prefixed(state(), "module._orig_mod."), ""),
        ({"model": state(), "model_ema": None, "epoch": 1}, "model"),
        ({"n_averaged": torch.tensor(3), **prefixed(state(), "module.")}, ""),
        ({"state_dict": prefixed(state(), "model.") | {"criterion.weight": torch.ones(3)}}, "state_dict"),
        (
            {"state_dict": prefixed(state(1), "model.") | prefixed(state(), "ema_model.module.")}
            | {"pytorch-lightning_version": "2.5.0", "hyper_parameters": {"lr": 0.1}, "callbacks": {}},
            "state_dict/ema_model.module",
        ),
        ({"model": state(1), "model_ema": state(), "args": argparse.Namespace(lr=1)}, "model_ema"),
    ],
    ids=[
        "bare",
        "ddp",
        "compiled",
        "ddp-compiled",
        "deit",
        "swa",
        "lightning",
        "lightning-ema",
        "deit-ema",
    ],
)
def test_weights_file__names_are_unwrapped(tmp_path: Path, content: Any, chosen: str) -> None:
    model, source = load_weights(saved(tmp_path / "a.pth", content), VIT, VIT_ARGS)
    check_same(model)
    assert source == chosen


def original_swin(state: State) -> dict[str, Tensor]:
    """As Microsoft's names go: the change of resolution ends a stage, a bare head, tables of indices."""
    renamed = {
        name.replace("layers.1.downsample", "layers.0.downsample").replace("head.fc.", "head."): value
        for name, value in state.items()
    }
    indices = torch.zeros(4, 4, dtype=torch.long)
    return renamed | {"layers.0.blocks.0.attn.relative_position_index": indices}


def test_weights_file__the_original_swin_with_its_settings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class CfgNode(dict[str, Any]):
        """yacs' own, as its pickles name it."""

    module = types.ModuleType("yacs.config")
    module.CfgNode = CfgNode  # type: ignore[attr-defined]
    CfgNode.__module__, CfgNode.__qualname__ = "yacs.config", "CfgNode"
    for name, value in (("yacs", types.ModuleType("yacs")), ("yacs.config", module)):
        monkeypatch.setitem(sys.modules, name, value)
    settings = CfgNode(DATA=CfgNode(IMG_SIZE=16))
    settings.__dict__["__immutable__"] = True
    content = {"model": original_swin(state(architecture=SWIN)), "config": settings}
    file = saved(tmp_path / "swin.pth", content)
    monkeypatch.undo()  # yacs is not needed to read it
    model, _ = load_weights(file, SWIN, SWIN_ARGS)
    check_same(model, architecture=SWIN)


def test_weights_file__a_bare_safetensors_file(tmp_path: Path) -> None:
    save_file(state(), tmp_path / "a.safetensors")
    check_same(load_weights(str(tmp_path / "a.safetensors"), VIT, VIT_ARGS)[0])


class Harmless:
    """A class of somebody's own: reading it could run code, were it another."""


WIDER = {**VIT_ARGS, "img_size": 32}


@pytest.mark.parametrize(
    ("content", "arguments", "says"),
    [
        ({"model": state(), "config": Harmless()}, VIT_ARGS, r"could run code.*test_weights_file\.Harmless"),
        ({"epoch": 3, "lr": 0.1}, VIT_ARGS, "no weights by a known name; it has epoch, lr"),
        ([1, 2], VIT_ARGS, "holds a list"),
        (
            prefixed(state(), "student.") | prefixed(state(1), "teacher."),
            VIT_ARGS,
            r"more than once: student\., teacher\.",
        ),
        ({n: v for n, v in state().items() if "fc1" not in n}, VIT_ARGS, r"Missing key.*blocks\.0\.mlp\.fc1"),
        (state(), {**VIT_ARGS, "embed_dim": 32}, "size mismatch"),
        (state(), {k: v for k, v in VIT_ARGS.items() if k != "img_size"}, r"give their size by .*img_size"),
        (
            {f"vit.encoder.layer.{i}.attention.attention.query.weight": torch.ones(2, 2) for i in range(2)},
            VIT_ARGS,
            "transformers library",
        ),
    ],
)
def test_weights_file__what_cannot_be_loaded(
    tmp_path: Path, content: Any, arguments: dict[str, Any], says: str
) -> None:
    with pytest.raises(InputError, match=says) as refused:
        load_weights(saved(tmp_path / "a.pth", content), VIT, arguments)
    assert "\n" not in str(refused.value)


def test_weights_file__no_file_no_architecture_and_damage(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file"):
        load_weights(str(tmp_path / "a.pth"), VIT)
    file = saved(tmp_path / "a.pth", state())
    with pytest.raises(InputError, match="does not say of which timm model"):
        load_weights(file)
    for cut in (100, 5000):
        (tmp_path / "b.pth").write_bytes(Path(file).read_bytes()[:cut])
        with pytest.raises(InputError, match="damaged, or no file"):
            load_weights(str(tmp_path / "b.pth"), VIT, VIT_ARGS)


def test_weights_file__other_images_by_their_size(tmp_path: Path) -> None:
    """Position tables are fitted to other images where these are asked for."""
    model, _ = load_weights(saved(tmp_path / "a.pth", state()), VIT, WIDER)
    assert model.pos_embed.shape[1] == 1 + 4**2


def test_weights_file__a_folder_of_it(tmp_path: Path) -> None:
    file = saved(tmp_path / "best.pth.tar", of_timm())
    arguments = [f"{key}={json.dumps(value)}" for key, value in VIT_ARGS.items()]
    lines = list(import_weights(file, str(tmp_path / "mine"), None, arguments, average=True))
    assert "best.pth.tar, state_dict_ema" in lines[1]
    check_same(load_checkpoint(str(tmp_path / "mine")).model, seed=1)
    record = json.loads((tmp_path / "mine/pruning.json").read_text())
    assert record["source"] == "best.pth.tar: state_dict_ema"
    with pytest.raises(InputError, match="--architecture = 'vit_tyny'"):
        list(import_weights(file, str(tmp_path / "other"), "vit_tyny", [], average=True))
    assert not (tmp_path / "other").exists()


def test_weights_file__a_file_that_knows_its_model_is_taken_by_every_command(tmp_path: Path) -> None:
    file = saved(tmp_path / "best.pth.tar", of_timm(model_kwargs=VIT_ARGS))
    loaded = load_checkpoint(file)
    check_same(loaded.model, seed=1)
    assert loaded.masks is None


def recipe(tmp_path: Path, model: dict[str, Any], *more: str) -> Any:
    train = write(tmp_path / "train.parquet", table([0, 1, 2] * 4))
    return load_recipe(
        "demo",
        [
            f"storage={tmp_path}/runs",
            f"data={{train: {train}}}",
            f"model={json.dumps(model)}",
            "structured=null",
            *more,
        ],
    )


def test_weights_file__a_recipe_starts_from_a_file(tmp_path: Path) -> None:
    file = saved(tmp_path / "a.pth", state())
    about = {"architecture": VIT, "classes": 3, "args": VIT_ARGS}
    own = recipe(tmp_path, about | {"checkpoint": file}, "dense=null")
    by_timm = recipe(tmp_path, about | {"args": {**VIT_ARGS, "checkpoint_path": file}}, "dense=null")
    assert by_timm.model == own.model
    assert "checkpoint_path" not in by_timm.model.args
    save_pretrained(by_timm.model, DataSettings(train=file), str(tmp_path / "dense"))
    written = (tmp_path / "dense/config.json").read_text()
    assert "checkpoint_path" not in written
    assert file not in written
    check_same(timm.create_model(f"local-dir:{tmp_path}/dense", pretrained=True))
    assert len(prepare(own).layers) == 8
    other = about | {"checkpoint": file, "classes": 5}
    with pytest.raises(InputError, match=r"model\.classes = 5: the weights know 3; a new head"):
        prepare(recipe(tmp_path, other, "dense=null"))
    assert prepare(recipe(tmp_path, other, "dense={epochs: 1}")).layers  # which trains it


def test_weights_file__what_a_recipe_may_not_say() -> None:
    for model, says in (
        ({"architecture": VIT, "checkpoint": "folder"}, "only where checkpoint is a file"),
        ({"architecture": VIT, "checkpoint": "a.pth", "pretrained": True}, "drop pretrained"),
        ({"architecture": VIT, "checkpoint": "a.pth", "args": {"checkpoint_path": "b.pth"}}, "drop one of"),
    ):
        with pytest.raises(ValueError, match=says):
            ModelSettings.model_validate(model)


def test_weights_file__plain_timm_puts_a_new_head_on_a_folder_that_came_without_its_name(
    tmp_path: Path,
) -> None:
    folder = dense_folder(tmp_path / "a", SWIN)
    config = json.loads((folder / "config.json").read_text())
    del config["pretrained_cfg"]["classifier"]
    edit_json(folder / "config.json", **config)
    (folder / "pruning.json").unlink()
    model = load_checkpoint(str(folder)).model
    save_checkpoint(tmp_path / "b", model, model_args={}, masks=None, record={})
    made = timm.create_model(f"local-dir:{tmp_path}/b", pretrained=True, num_classes=7)
    assert made.head.fc.weight.shape[0] == 7
    assert torch.equal(made.layers[0].blocks[0].mlp.fc1.weight, model.layers[0].blocks[0].mlp.fc1.weight)


VITS = {"model_type": "vit", "architectures": ["ViTForImageClassification"], "hidden_size": 384}


def test_weights_file__a_folder_of_transformers_is_named_with_timms_counterpart(tmp_path: Path) -> None:
    folder = dense_folder(tmp_path / "a")
    (folder / "config.json").write_text(json.dumps(VITS))
    with pytest.raises(InputError, match=r"ViTForImageClassification.*counterpart is vit_small_patch16_224"):
        load_checkpoint(str(folder))


@pytest.mark.parametrize(
    ("config", "name"),
    [
        ({"model_type": "deit", "hidden_size": 192}, "deit_tiny_patch16_224"),
        (
            {
                "model_type": "deit",
                "hidden_size": 768,
                "architectures": ["DeiTForImageClassificationWithTeacher"],
            },
            "deit_base_distilled_patch16_224",
        ),
        ({"model_type": "swin", "embed_dim": 96, "depths": [2, 2, 18, 2]}, "swin_small_patch4_window7_224"),
        ({"model_type": "swinv2", "embed_dim": 128, "depths": [2, 2, 18, 2]}, "swinv2_base_window8_256"),
        ({"model_type": "convnext", "depths": [3, 3, 27, 3], "hidden_sizes": [96]}, "convnext_small"),
        ({"model_type": "resnet", "depths": [3, 4, 6, 3], "layer_type": "bottleneck"}, "resnet50"),
        ({"model_type": "dinov2", "hidden_size": 1024}, "vit_large_patch14_dinov2"),
        ({"model_type": "levit", "hidden_sizes": [128, 256, 384], "depths": [4, 4, 4]}, "levit_128"),
        ({"model_type": "pvt_v2", "hidden_sizes": [64], "depths": [3, 4, 6, 3]}, "pvt_v2_b2"),
        ({"model_type": "swin", "embed_dim": 100, "window_size": 3}, None),
    ],
)
def test_weights_file__timms_counterpart(config: dict[str, Any], name: str | None) -> None:
    assert counterpart(config) == name
