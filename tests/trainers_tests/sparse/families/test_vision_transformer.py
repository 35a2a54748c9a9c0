"""Whole models on the sparse engine against torch, and their folders."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from trainers.sparse.kernels import host
from trainers.sparse.packing import pack, packed, vision_transformer
from trainers.sparse.runtime import SparseModel, load

TINY: dict[str, Any] = {
    "img_size": 48,
    "patch_size": 8,
    "embed_dim": 24,
    "depth": 3,
    "num_heads": 3,
    "num_classes": 5,
}


def tiny(sparsity: float = 0.8, kind: type[nn.Module] = VisionTransformer, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    model = kind(**{**TINY, **options}).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.2)
        for name, module in model.named_modules():
            if isinstance(module, nn.Linear) and "head" not in name:
                module.weight.mul_(torch.rand_like(module.weight) >= sparsity)
    return model


def images(count: int, size: tuple[int, int] = (48, 48)) -> torch.Tensor:
    return torch.randn(count, 3, *size, generator=torch.Generator().manual_seed(1))


def assert_same(model: nn.Module, count: int = 2, size: tuple[int, int] = (48, 48), **options: Any) -> None:
    batch = images(count, size)
    with torch.no_grad():
        expected = model(batch).numpy()
    result = SparseModel(*vision_transformer(model), **options)(batch.numpy())
    np.testing.assert_allclose(result, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"class_token": False, "global_pool": "avg", "fc_norm": True},
        {"global_pool": "avg", "fc_norm": False},
        {"init_values": 0.5, "qkv_bias": False},
        {"reg_tokens": 2, "pre_norm": True, "no_embed_class": True},
        {"num_classes": 0},
        {"img_size": (40, 56)},
        {"depth": 0},
    ],
    ids=str,
)
def test_vision_transformer__a_tiny_model_is_torchs(options: dict[str, Any]) -> None:
    assert_same(tiny(**options), size=options.get("img_size", (48, 48)))


def test_vision_transformer__a_distilled_model_is_torchs() -> None:
    assert_same(tiny(kind=VisionTransformerDistilled))


@pytest.mark.parametrize("sparsity", [0.0, 0.2, 0.9, 1.0])
@pytest.mark.parametrize("threads", [1, 3])
def test_vision_transformer__every_sparsity_batch_and_thread_count(sparsity: float, threads: int) -> None:
    model = tiny(sparsity)
    ready = SparseModel(*vision_transformer(model), threads=threads)
    for count in (1, 3, 1):
        with torch.no_grad():
            expected = model(images(count)).numpy()
        for _ in range(3):
            result = ready(images(count).numpy())
            np.testing.assert_allclose(result, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())


def test_vision_transformer__no_images_give_no_logits() -> None:
    assert SparseModel(*vision_transformer(tiny()))(images(0).numpy()).shape == (0, 5)


@pytest.mark.parametrize(
    "wrong", [images(1)[0].numpy(), images(1).double().numpy(), images(1)[..., 1:].numpy()]
)
def test_vision_transformer__images_of_another_shape_are_named(wrong: Any) -> None:
    with pytest.raises(ValueError, match="images: float32"):
        SparseModel(*vision_transformer(tiny()))(wrong)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"qk_norm": True}, "q_norm"),
        ({"global_pool": "map"}, "global_pool"),
        ({"act_layer": nn.ReLU}, "mlp"),
        ({"proj_bias": True, "scale_mlp_norm": True}, "mlp.norm"),
    ],
)
def test_vision_transformer__a_part_that_is_not_packed_is_named(options: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        vision_transformer(tiny(**options))


def test_vision_transformer__another_kind_of_model_is_named() -> None:
    with pytest.raises(ValueError, match="Linear"):
        packed(nn.Linear(2, 2))


def test_vision_transformer__a_folder_is_read_back_without_torch(tmp_path: Path) -> None:
    model, folder = tiny(), tmp_path / "model"
    pack(model, folder)
    np.save(tmp_path / "images.npy", images(2).numpy())
    program = (
        "import sys, numpy\n"
        "from trainers.sparse.runtime import load\n"
        "folder, images, logits = sys.argv[1:]\n"
        "numpy.save(logits, load(folder)(numpy.load(images)))\n"
        "heavy = {'torch', 'timm', 'ray', 'mlflow', 'numba', 'pydantic'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    paths = [str(folder), str(tmp_path / "images.npy"), str(tmp_path / "logits.npy")]
    subprocess.run([sys.executable, "-c", program, *paths], check=True, cwd=Path(__file__).parents[4])
    with torch.no_grad():
        expected = model(images(2)).numpy()
    np.testing.assert_allclose(np.load(paths[2]), expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())


def test_vision_transformer__a_folder_that_was_changed_or_is_of_another_version_is_refused(
    tmp_path: Path,
) -> None:
    pack(tiny(), tmp_path)
    program = tmp_path / "program.json"
    data = json.loads(program.read_text())
    program.write_text(json.dumps({**data, "version": 99}))
    with pytest.raises(ValueError, match="checksum"):
        load(tmp_path)
    sums = tmp_path / "checksums.json"
    sums.write_text(json.dumps({}))
    with pytest.raises(ValueError, match="version 99"):
        load(tmp_path)
    with pytest.raises(ValueError, match="no folder of a sparse model"):
        load(tmp_path / "missing")


@pytest.mark.skipif(not host.has_vnni(), reason="needs AVX-512 VNNI")
def test_vision_transformer__an_int8_model_is_near_torchs_and_smaller(tmp_path: Path) -> None:
    model = tiny(init_values=0.5)
    with torch.no_grad():
        for module in model.blocks.modules():
            if isinstance(module, nn.Linear):
                kept = torch.rand(module.out_features, module.in_features // 4) < 0.25
                module.weight.normal_(0, 0.2).mul_(kept.repeat_interleave(4, 1))
    pack(model, tmp_path / "real")
    pack(model, tmp_path / "int8", int8=True)
    with torch.no_grad():
        expected = model(images(3)).numpy()
    result = load(tmp_path / "int8", threads=2)(images(3).numpy())
    assert 0 < np.abs(result - expected).max() < 0.05 * np.abs(expected).max()
    sizes = {
        name: sum(layer.bytes for layer in load(tmp_path / name).layers.values()) for name in ("real", "int8")
    }
    assert sizes["int8"] < 0.7 * sizes["real"]


def test_vision_transformer__int8_without_the_instructions_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "has_vnni", lambda: False)
    with pytest.raises(ValueError, match="AVX-512 VNNI"):
        SparseModel(*vision_transformer(tiny(), int8=True))
