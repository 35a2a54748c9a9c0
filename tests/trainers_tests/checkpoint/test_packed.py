"""Compressed weights: every bit comes back, by our reader and by the few lines of the guide. How small."""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from image_tables import SWIN, VIT, dense_folder, images, tiny
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from pruners import MaskSet, prune
from pruners.errors import InputError
from trainers.checkpoint.folder import (
    load_checkpoint,
    open_verified,
    pack_folder,
    save_checkpoint,
    size_on_disk,
    weights_hash,
)
from trainers.checkpoint.packed import PACKED_FORMAT, read_packed, write_packed
from trainers.models.factory import load_timm_folder

GUIDE = Path(__file__).parents[3] / "docs/guides/export.md"
WORDS = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}


def bits_of(tensor: Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(
        (tensor.dtype, tensor.shape, bits_of(tensor))
        == (second[k].dtype, second[k].shape, bits_of(second[k]))
        for k, tensor in first.items()
    )


def packed(source: Path, target: Path) -> list[str]:
    target.mkdir()
    with open_verified(str(source)) as (folder, record):
        return pack_folder(folder, target, record)


def pruned(folder: Path, architecture: str = VIT, pattern: str = "unstructured") -> tuple[Path, nn.Module]:
    model, arguments = tiny(architecture)
    report = prune(model, "magnitude", 0.75 if pattern == "unstructured" else None, pattern=pattern)
    record = {"method": "magnitude", "sparsity": report.sparsity, "allocation": report.allocation}
    save_checkpoint(folder, model, model_args=arguments, masks=report.masks, record=record)
    return folder, model


@pytest.fixture(scope="module")
def load_packed() -> Callable[[str], nn.Module]:
    """The function of the guide, as it stands there."""
    section = GUIDE.read_text(encoding="utf-8").partition("## Smaller files")[2]
    result = re.search(r"```python\n(.*?)```", section, re.DOTALL)
    assert result is not None
    assert len([line for line in result[1].splitlines() if line.strip()]) <= 20
    names: dict[str, Any] = {}
    exec(result[1], names)
    assert "espalier" not in {module.partition(".")[0] for module in re.findall(r"import (\w+)", result[1])}
    load: Callable[[str], nn.Module] = names["load_packed"]
    return load


# the file


@pytest.mark.parametrize("kind", [torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int64])
def test_packed__every_bit_comes_back(kind: torch.dtype, tmp_path: Path) -> None:
    """Also NaN with payloads (quiet and signalling), infinities, the least numbers, and both zeros."""
    size = torch.empty(0, dtype=kind).element_size()
    random = np.random.default_rng(0)
    words = random.integers(0, 2 ** (8 * size) - 1, (37, 53), dtype=WORDS[size], endpoint=True)
    words[random.random(words.shape) < 0.8] = 0
    words[0, :3] = 1, 1 << (8 * size - 1), (1 << (8 * size - 1)) + 1  # -0.0 is the second
    tensor = torch.from_numpy(words.view(f"i{size}").copy()).view(kind)
    given = {"a.weight": tensor, "a.bias": tensor[:9, 0].contiguous(), "number": tensor[0, 0].clone()}
    names = write_packed(tmp_path / "file", given, None)
    result, masks = read_packed(tmp_path / "file")
    assert names == ["a.weight"]
    assert masks is None
    assert same(given, result)
    values = zlib.decompress(load_file(tmp_path / "file")["a.weight.values"].numpy().tobytes())
    assert len(values) == size * np.count_nonzero(words)
    assert (tmp_path / "file").stat().st_size < 0.5 * words.nbytes + 1500


def test_packed__the_bits_are_as_the_docstring_says(tmp_path: Path) -> None:
    weight = torch.zeros(3, 333)
    weight[0, 0], weight[0, 9], weight[2, 332] = 1.0, -0.0, 3.0
    write_packed(tmp_path / "file", {"w": weight}, None)
    bits = load_file(tmp_path / "file")["w.mask"]
    assert bits[:2].tolist() == [0b10000000, 0b01000000]
    assert bits[-1] == 0b00000010  # of the 999th weight, and one bit more
    planes = zlib.decompress(load_file(tmp_path / "file")["w.values"].numpy().tobytes())
    assert planes == bytes(6) + bytes([0x80, 0x00, 0x40, 0x3F, 0x80, 0x40])  # 3f800000, 80000000, 40400000


def test_packed__what_packing_does_not_make_smaller_stays(tmp_path: Path) -> None:
    full, almost, small = torch.ones(100, 100), torch.ones(100, 100), torch.zeros(8, 8)
    almost.view(-1)[:300] = 0.0  # 1,200 bytes less, 1,250 of bits more
    given = {"full": full, "almost": almost, "small": small, "none": torch.zeros(0, 4)}
    assert write_packed(tmp_path / "file", given, None) == []
    assert load_file(tmp_path / "file").keys() == given.keys()
    assert same(given, read_packed(tmp_path / "file")[0])


def test_packed__masks_that_are_not_the_zeros(tmp_path: Path) -> None:
    """A kept weight may be zero by chance, a pruned one -0.0, and a pruned layer may stay dense."""
    weights = {name: torch.zeros(40, 40) for name in ("chance", "negative", "equal")}
    masks = {name: torch.zeros(40, 40, dtype=torch.bool) for name in (*weights, "dense")}
    for name, weight in weights.items():
        weight[0], masks[name][0] = 1.0, True
    weights |= {"dense": torch.ones(40, 40)}
    masks["dense"][:, 0] = True
    masks["chance"][1, 1] = True
    weights["negative"][2, 2] = -0.0
    write_packed(tmp_path / "file", weights, MaskSet(masks))
    result, read = read_packed(tmp_path / "file")
    assert read is not None
    assert read.fingerprint() == MaskSet(masks).fingerprint()
    assert same(weights, result)
    extra = {name for name in load_file(tmp_path / "file") if name.endswith(".kept")}
    assert extra == {"chance.kept", "negative.kept", "dense.kept"}


# folders


@pytest.mark.parametrize("architecture", [VIT, SWIN])
@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
def test_packed__a_compressed_folder_is_the_same_model(
    architecture: str, pattern: str, tmp_path: Path, load_packed: Callable[[str], nn.Module]
) -> None:
    source, model = pruned(tmp_path / "m", architecture, pattern)
    assert packed(source, tmp_path / "c")
    dense, small = load_checkpoint(str(source)), load_checkpoint(f"file://{tmp_path}/c")
    assert same(dict(dense.model.state_dict()), dict(small.model.state_dict()))
    assert same(dict(dense.model.state_dict()), dict(load_packed(str(tmp_path / "c")).state_dict()))
    assert dense.masks is not None
    assert small.masks is not None
    assert small.masks.fingerprint() == dense.masks.fingerprint()
    about = {"files", "packed_from"}
    assert {k: v for k, v in small.record.items() if k not in about} == {
        k: v for k, v in dense.record.items() if k not in about
    }
    with torch.no_grad():
        assert torch.equal(small.model.eval()(images(2)), model.eval()(images(2)))
    assert small.model.pretrained_cfg == dense.model.pretrained_cfg | {"file": str(tmp_path / "c")}
    assert weights_hash(str(source)) == weights_hash(str(tmp_path / "c"))
    packed(tmp_path / "c", tmp_path / "again")
    assert all(
        (tmp_path / "again" / file.name).read_bytes() == file.read_bytes()
        for file in (tmp_path / "c").iterdir()
    )


def test_packed__three_quarters_of_zeros_take_less_than_thirty_percent(tmp_path: Path) -> None:
    arguments = {"img_size": 32, "patch_size": 8, "embed_dim": 384, "depth": 4}
    model = timm.create_model(VIT, num_classes=3, **arguments)
    report = prune(model, "magnitude", 0.75)
    save_checkpoint(tmp_path / "m", model, model_args={}, masks=report.masks, record={})
    packed(tmp_path / "m", tmp_path / "c")
    layers = sum(4 * mask.numel() for mask in report.masks.values())
    rest = (tmp_path / "m/model.safetensors").stat().st_size - layers
    assert size_on_disk(tmp_path / "c") - rest < 0.245 * layers  # a quarter of 26 to 27 bits, and one bit
    assert size_on_disk(tmp_path / "c") < 0.27 * (tmp_path / "m/model.safetensors").stat().st_size


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16])
def test_packed__half_precision_and_nan(
    kind: torch.dtype, tmp_path: Path, load_packed: Callable[[str], nn.Module]
) -> None:
    """A foreign folder in another type: timm makes the same of it, packed or not."""
    source, _ = pruned(tmp_path / "m")
    for name in ("pruning.json", "masks.safetensors"):
        (source / name).unlink()
    state = {name: tensor.to(kind) for name, tensor in load_file(source / "model.safetensors").items()}
    first = state["blocks.0.mlp.fc1.weight"].view(torch.int16).view(-1)
    first[:3] = torch.tensor([-1, 0x7FC1, -32768], dtype=torch.int16)
    save_file(state, source / "model.safetensors")
    packed(source, tmp_path / "c")
    assert same(state, read_packed(tmp_path / "c/model.safetensors.packed")[0])
    plain = dict(load_timm_folder(source).state_dict())
    assert same(plain, dict(load_packed(str(tmp_path / "c")).state_dict()))
    with pytest.raises(InputError, match=r"blocks\.0\.mlp\.fc1\.weight is not finite"):
        load_checkpoint(str(tmp_path / "c"))
    first[:3] = 0
    save_file(state, source / "model.safetensors")
    packed(source, tmp_path / "finite")
    plain = dict(load_timm_folder(source).state_dict())
    assert same(plain, dict(load_checkpoint(str(tmp_path / "finite")).model.state_dict()))
    result = load_checkpoint(str(tmp_path / "finite")).masks
    assert result is not None
    assert result.sparsity == pytest.approx(0.75, abs=1e-3)


def test_packed__a_model_without_zeros(tmp_path: Path) -> None:
    source = dense_folder(tmp_path / "m")
    assert packed(source, tmp_path / "c") == []
    loaded = load_checkpoint(str(tmp_path / "c"))
    assert loaded.masks is None
    assert same(load_file(source / "model.safetensors"), dict(loaded.model.state_dict()))


def test_packed__plain_timm_finds_no_weights_in_it(tmp_path: Path) -> None:
    """Its glob would take any file of a known ending, and for ``features_only`` none of the tensors in it."""
    source, _ = pruned(tmp_path / "m")
    packed(source, tmp_path / "c")
    for options in ({}, {"features_only": True, "out_indices": (0, 1)}):
        with pytest.raises(RuntimeError, match="No suitable checkpoints"):
            timm.create_model(f"local-dir:{tmp_path}/c", pretrained=True, **options)


def edited(change: Callable[[dict[str, Tensor], dict[str, Any]], object]) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        stored = load_file(path)
        about = {
            "packed": {
                name[:-5]: ["float32", [48, 16]] for name in stored if name.endswith("qkv.weight.mask")
            },
            "masks": [],
        }
        change(stored, about)
        save_file(stored, path, metadata={PACKED_FORMAT: json.dumps(about)})

    return damage


QKV = "blocks.0.attn.qkv.weight"


def deflated(numel: int) -> Tensor:
    return torch.frombuffer(bytearray(zlib.compress(bytes(4 * numel))), dtype=torch.uint8)


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (Path.unlink, "model.safetensors is missing"),
        (lambda path: path.write_bytes(path.read_bytes()[:500]), "packed is truncated"),
        (lambda path: save_file({"a": torch.ones(1)}, path), "holds no packed weights"),
        (edited(lambda stored, about: stored.pop(f"{QKV}.values")), "holds no packed weights"),
        (edited(lambda stored, about: stored.pop(f"{QKV}.mask")), "holds no packed weights"),
        (edited(lambda stored, about: about.pop("masks")), "holds no packed weights"),
        (edited(lambda stored, about: about.update(masks=["head.weight"])), "holds no packed weights"),
        (
            edited(lambda stored, about: about["packed"].update({QKV: ["float32", [48, 17]]})),
            "holds no packed",
        ),
        (
            edited(lambda stored, about: stored.update({f"{QKV}.values": deflated(3)})),
            "its values do not fit",
        ),
        # a bomb, a wrong type, and bytes that are no stream
        (
            edited(lambda stored, about: stored.update({f"{QKV}.values": deflated(10**7)})),
            "its values do not fit",
        ),
        (edited(lambda stored, about: about["packed"].update({QKV: ["load", [48, 16]]})), "holds no packed"),
        (edited(lambda stored, about: stored.update({f"{QKV}.values": torch.ones(3)})), "holds no packed"),
        (edited(lambda stored, about: None), "timm cannot load it"),  # the other layers are still packed
    ],
)
def test_packed__damage_is_named(damage: Callable[[Path], None], says: str, tmp_path: Path) -> None:
    source, _ = pruned(tmp_path / "m")
    packed(source, tmp_path / "c")
    whole = (tmp_path / "c/pruning.json").read_text()
    (tmp_path / "c/pruning.json").unlink()  # its checksums would tell it all at once
    damage(tmp_path / "c/model.safetensors.packed")
    with pytest.raises(InputError, match=says) as error:
        load_checkpoint(str(tmp_path / "c"), key="model")
    assert "\n" not in str(error.value)
    if (tmp_path / "c/model.safetensors.packed").exists():
        (tmp_path / "c/pruning.json").write_text(whole)
        with pytest.raises(InputError, match=r"is not the file|is truncated"):
            load_checkpoint(str(tmp_path / "c"), key="model")
