"""The checkpoint folder: what plain timm makes of it, what its record says, and which damage is named."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import timm
import torch
from image_tables import SWIN, VIT, dense_folder, edit_json, images, tiny
from pyarrow import fs
from safetensors import safe_open

from pruners import MaskSet, find_layers, prune
from pruners.errors import InputError
from trainers.checkpoint.folder import (
    CHECKPOINT_FORMAT,
    load_checkpoint,
    model_args,
    save_checkpoint,
    size_on_disk,
    verify,
)
from trainers.sources.parquet import read_table


def pruned_folder(folder: Path, architecture: str = VIT) -> tuple[Path, torch.nn.Module, MaskSet]:
    model, arguments = tiny(architecture)
    report = prune(model, "dimap", 0.6)
    record = {"method": "dimap", "sparsity": report.sparsity, "allocation": report.allocation}
    save_checkpoint(folder, model, model_args=arguments, masks=report.masks, record=record)
    return folder, model, report.masks


@pytest.mark.parametrize("architecture", [VIT, SWIN])
def test_folder__plain_timm_gives_the_same_outputs(architecture: str, tmp_path: Path) -> None:
    folder, model, _ = pruned_folder(tmp_path / "m", architecture)
    plain = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    with torch.no_grad():
        assert torch.equal(plain(images(4)), model.eval()(images(4)))
    assert plain.num_classes == 3
    assert plain.pretrained_cfg["input_size"] == (3, 16, 16)


@pytest.mark.parametrize("architecture", [VIT, SWIN])
def test_folder__what_is_saved_is_loaded(architecture: str, tmp_path: Path) -> None:
    folder, model, masks = pruned_folder(tmp_path / "m", architecture)
    for uri in (str(folder), f"file://{folder}"):
        loaded = load_checkpoint(uri)
        assert loaded.masks is not None
        assert loaded.masks.fingerprint() == masks.fingerprint()
        state = loaded.model.state_dict()
        assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())
        assert loaded.record["method"] == "dimap"
        assert loaded.record["architecture"] == architecture
    expected = tiny(architecture)[1] | {"img_size": [16, 16], "num_classes": 3}  # as timm writes them
    content = model_args(folder)
    assert {key: content[key] for key in expected} == expected


def test_folder__a_dense_folder_has_no_masks(tmp_path: Path) -> None:
    folder = dense_folder(tmp_path / "m")
    assert sorted(path.name for path in folder.iterdir()) == [
        "config.json",
        "model.safetensors",
        "pruning.json",
    ]
    assert load_checkpoint(str(folder)).masks is None


def test_folder__the_record(tmp_path: Path) -> None:
    folder, _, masks = pruned_folder(tmp_path / "m")
    record = json.loads((folder / "pruning.json").read_text())
    assert record["format"] == CHECKPOINT_FORMAT
    assert record["allocation"] == masks.pruned()
    assert record["sparsity"] == pytest.approx(0.6, abs=1e-4)
    assert set(record["files"]) == {"model.safetensors", "config.json", "masks.safetensors"}
    assert {"python", "espalier", "torch", "timm"} <= set(record["versions"])


def test_folder__nothing_is_pickled(tmp_path: Path) -> None:
    folder, _, masks = pruned_folder(tmp_path / "m")
    for path in folder.iterdir():
        assert path.stat().st_mode & 0o044 == 0o044, f"{path.name} cannot be read by others"
        if path.suffix == ".json":
            json.loads(path.read_text())
            continue
        assert path.suffix == ".safetensors"
        with safe_open(path, framework="pt") as file:
            assert list(file.keys())
    bits = sum(-(-mask.numel() // 8) for mask in masks.values())
    assert bits <= (folder / "masks.safetensors").stat().st_size < bits + 4096
    assert size_on_disk(folder) == sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def test_folder__masks_of_a_plain_timm_folder_are_its_zeros(tmp_path: Path) -> None:
    folder, _, masks = pruned_folder(tmp_path / "m")
    (folder / "masks.safetensors").unlink()
    (folder / "pruning.json").unlink()
    loaded = load_checkpoint(str(folder))
    assert loaded.masks is not None
    assert loaded.masks.fingerprint() == masks.fingerprint()
    assert loaded.record == {}
    dense = dense_folder(tmp_path / "d")
    (dense / "pruning.json").unlink()
    assert load_checkpoint(str(dense)).masks is None


def test_folder__masks_of_chosen_layers(tmp_path: Path) -> None:
    folder, model, masks = pruned_folder(tmp_path / "m")
    (folder / "masks.safetensors").unlink()
    (folder / "pruning.json").unlink()
    loaded = load_checkpoint(str(folder), layers={"QKV": (r"attn\.qkv",)})
    assert loaded.masks is not None
    assert set(loaded.masks) == {layer.name for layer in find_layers(model, {"QKV": (r"attn\.qkv",)})}
    assert all(torch.equal(loaded.masks[name], masks[name]) for name in loaded.masks)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(bytes(content))


@pytest.mark.parametrize(
    ("name", "damage", "says"),
    [
        ("config.json", Path.unlink, "config.json is missing"),
        ("model.safetensors", Path.unlink, "model.safetensors is missing"),
        ("masks.safetensors", Path.unlink, "masks.safetensors is missing; pruning.json lists it"),
        ("config.json", cut, "config.json must be timm's"),
        ("model.safetensors", cut, "model.safetensors is truncated"),
        ("masks.safetensors", cut, "masks.safetensors is not the file"),
        ("pruning.json", cut, "pruning.json must be a record"),
        ("model.safetensors", flip, r"model.safetensors is not the file .*checksum"),
        ("masks.safetensors", flip, r"masks.safetensors is not the file .*checksum"),
        ("config.json", lambda path: path.write_bytes(b"\xff\xfe\x00"), "config.json must be timm's"),
        ("config.json", lambda path: path.write_text("[1]"), "config.json must be timm's"),
        ("config.json", lambda path: edit_json(path, architecture=SWIN), "config.json is not the file"),
        ("pruning.json", lambda path: path.write_text("[]"), "pruning.json must be a record"),
        ("pruning.json", lambda path: edit_json(path, files=3), "pruning.json must be a record"),
        ("pruning.json", lambda path: edit_json(path, files={"../x": "y"}), r"pruning.json must be a record"),
        ("model.safetensors", lambda path: path.write_bytes(b""), "model.safetensors is truncated"),
        ("model.safetensors", lambda path: path.write_bytes(b"PK" * 99), "model.safetensors is truncated"),
    ],
)
def test_folder__damage_is_named(name: str, damage: object, says: str, tmp_path: Path) -> None:
    folder, _, _ = pruned_folder(tmp_path / "m")
    damage(folder / name)  # type: ignore[operator]
    with pytest.raises(InputError, match=says) as error:
        load_checkpoint(str(folder), key="model.checkpoint")
    assert error.value.key == "model.checkpoint"
    assert error.value.value == str(folder)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "masks.safetensors"])
def test_folder__a_file_of_another_checkpoint_is_foreign(name: str, tmp_path: Path) -> None:
    folder, _, _ = pruned_folder(tmp_path / "m")
    other, _, _ = pruned_folder(tmp_path / "o", SWIN)
    shutil.copy(other / name, folder / name)
    with pytest.raises(InputError, match=rf"{name} is not the file that pruning.json describes"):
        verify(folder, str(folder))


@pytest.mark.parametrize("changes", [{"architecture": "nothing_of_timm"}, {"model_args": {"depths": 3}}])
def test_folder__a_foreign_folder_that_timm_refuses(changes: dict[str, object], tmp_path: Path) -> None:
    folder = dense_folder(tmp_path / "m")
    (folder / "pruning.json").unlink()
    edit_json(folder / "config.json", **changes)
    with pytest.raises(InputError, match="timm cannot load it"):
        load_checkpoint(str(folder))


def test_folder__weights_of_another_architecture(tmp_path: Path) -> None:
    folder, other = dense_folder(tmp_path / "m"), dense_folder(tmp_path / "o", SWIN)
    (folder / "pruning.json").unlink()
    shutil.copy(other / "model.safetensors", folder / "model.safetensors")
    with pytest.raises(InputError, match="timm cannot load it") as error:
        load_checkpoint(str(folder))
    assert "\n" not in str(error.value)


def test_folder__masks_of_another_architecture(tmp_path: Path) -> None:
    folder, _, _ = pruned_folder(tmp_path / "m")
    other, _, _ = pruned_folder(tmp_path / "o", SWIN)
    (folder / "pruning.json").unlink()
    shutil.copy(other / "masks.safetensors", folder / "masks.safetensors")
    with pytest.raises(InputError, match=r"masks\.safetensors does not fit the model"):
        load_checkpoint(str(folder))


def test_folder__no_folder(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such folder"):
        load_checkpoint(str(tmp_path / "nothing"))
    with pytest.raises(InputError, match="no such folder"):
        load_checkpoint(f"file://{tmp_path}/nothing")
    with pytest.raises(InputError, match=r"model\.checkpoint = 'nowhere://x'.*pyarrow URI"):
        load_checkpoint("nowhere://x", key="model.checkpoint")


class Far:
    """A file system that holds nothing, or that does not answer."""

    def __init__(self, answers: bool) -> None:
        self.answers = answers

    def get_file_info(self, path: str) -> fs.FileInfo:
        if not self.answers:
            raise OSError("no route to host\nand more")
        return fs.FileInfo(path, fs.FileType.NotFound)


@pytest.mark.parametrize(("answers", "says"), [(True, "no such f"), (False, "cannot be reached")])
def test_folder__what_is_not_there_far_away(
    answers: bool, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("trainers.storage", "trainers.sources.files"):
        monkeypatch.setattr(f"{module}.resolve", lambda uri, key: (Far(answers), uri))
    for call in (load_checkpoint, read_table):
        with pytest.raises(InputError, match=says) as error:
            call("far://bucket/x", key="where")
        assert error.value.key == "where"
        assert "\n" not in str(error.value)


def test_folder__a_second_save_replaces_the_first(tmp_path: Path) -> None:
    folder, _, _ = pruned_folder(tmp_path / "m")
    model, arguments = tiny(VIT, seed=5)
    save_checkpoint(folder, model, model_args=arguments, masks=None, record={"method": "dense"})
    assert load_checkpoint(str(folder)).masks is None


def test_folder__a_figure_that_is_no_number_leaves_a_record_that_is_json(tmp_path: Path) -> None:
    model, arguments = tiny()
    figures = {"val_loss": float("nan"), "val_top1": 0.25, "losses": (1.0, float("inf"))}
    save_checkpoint(tmp_path / "one", model, model_args=arguments, masks=None, record={"figures": figures})

    def refused(name: str) -> None:
        raise AssertionError(f"{name} is no JSON")

    text = (tmp_path / "one" / "pruning.json").read_text()
    content = json.loads(text, parse_constant=refused)["figures"]
    assert content == {"val_loss": None, "val_top1": 0.25, "losses": [1.0, None]}
    assert load_checkpoint(str(tmp_path / "one")).record["figures"] == content
