"""Swin transformers on the sparse engine against torch's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sparse_tiles import exponentials
from timm.layers import RmsNorm
from timm.models.swin_transformer import SwinTransformer
from torch import nn

from trainers.sparse import windows
from trainers.sparse.kernels import host
from trainers.sparse.packing import pack, packed
from trainers.sparse.runtime import SparseModel, load

TINY: dict[str, Any] = {
    "img_size": 32,
    "patch_size": 2,
    "window_size": 4,
    "embed_dim": 12,
    "depths": (2, 2, 2),
    "num_heads": (1, 2, 3),
    "num_classes": 5,
}


def tiny(sparsity: float = 0.8, block: int = 1, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    model = SwinTransformer(**{**TINY, **options}).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.2)
        for name, module in model.named_modules():
            if isinstance(module, nn.Linear) and "head" not in name:
                kept = torch.rand(module.out_features, module.in_features // block) >= sparsity
                module.weight.mul_(kept.repeat_interleave(block, 1))
    return model


def images(model: Any, count: int) -> torch.Tensor:
    size = model.patch_embed.img_size
    return torch.randn(count, 3, *size, generator=torch.Generator().manual_seed(1))


def assert_same(model: nn.Module, counts: tuple[int, ...] = (2,), **options: Any) -> None:
    ready = SparseModel(*packed(model), **options)
    for count in counts:
        batch = images(model, count)
        with torch.no_grad():
            expected = model(batch).numpy()
        for _ in range(2):
            result = ready(batch.numpy())
            np.testing.assert_allclose(result, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"window_size": 7, "img_size": 56, "patch_size": 4},
        {"window_size": (4, 2)},
        {"window_size": (2, 8), "img_size": (16, 64)},
        {"window_size": 5},  # windows reach beyond the grid
        {"window_size": 5, "qkv_bias": False},
        {"img_size": (36, 52)},  # odd edges are merged
        {"window_size": 4, "img_size": 8, "always_partition": True},
        {"head_dim": 7, "mlp_ratio": 1.3},
        {"num_heads": (2, 2, 1), "head_dim": [3, 5, 12], "mlp_ratio": [1, 2, 3]},
        {"num_classes": 0},
        {"depths": (1,), "num_heads": (2,)},
        {"depths": (3, 1), "num_heads": (2, 2)},
    ],
    ids=str,
)
def test_swin__a_tiny_model_is_torchs(options: dict[str, Any]) -> None:
    assert_same(tiny(**options))


@pytest.mark.parametrize("sparsity", [0.0, 0.9, 1.0])
@pytest.mark.parametrize("threads", [1, 3])
def test_swin__every_sparsity_batch_and_thread_count(sparsity: float, threads: int) -> None:
    assert_same(tiny(sparsity), (1, 3, 5, 1), threads=threads)


def test_swin__no_images_give_no_logits() -> None:
    model = tiny()
    assert SparseModel(*packed(model))(images(model, 0).numpy()).shape == (0, 5)


def test_swin__a_folder_gives_the_same(tmp_path: Path) -> None:
    model = tiny(window_size=5)
    pack(model, tmp_path)
    with torch.no_grad():
        expected = model(images(model, 2)).numpy()
    result = load(tmp_path, threads=2)(images(model, 2).numpy())
    np.testing.assert_allclose(result, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())


@pytest.mark.parametrize(
    ("options", "named"),
    [({"global_pool": "max"}, "global_pool 'max'"), ({"norm_layer": RmsNorm}, "RmsNorm here is not packed")],
)
def test_swin__a_part_that_is_not_packed_is_named(options: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        packed(tiny(**options))


@pytest.mark.skipif(not host.has_vnni(), reason="needs AVX-512 VNNI")
def test_swin__an_int8_model_is_near_torchs() -> None:
    model = tiny(0.5, block=4, num_heads=(1, 2, 4))
    with torch.no_grad():
        expected = model(images(model, 3)).numpy()
    result = SparseModel(*packed(model, int8=True))(images(model, 3).numpy())
    assert 0 < np.abs(result - expected).max() < 0.1 * np.abs(expected).max()


@settings(max_examples=200, deadline=None)
@given(
    grid=st.tuples(st.integers(1, 20), st.integers(1, 20)),
    window=st.tuples(st.integers(1, 8), st.integers(1, 8)),
    data=st.data(),
)
def test_swin__every_token_is_in_one_window_and_windows_are_few_runs(
    grid: tuple[int, int], window: tuple[int, int], data: st.DataObject
) -> None:
    shift = (data.draw(st.integers(0, window[0] - 1)), data.draw(st.integers(0, window[1] - 1)))
    order = windows.token_order(grid, window, shift)
    np.testing.assert_array_equal(np.sort(order), np.arange(grid[0] * grid[1]))
    for by, most in (((0, 0), 1), (shift, 4)):
        part = windows.partition(grid, window, by, order, shift)
        inside = part.tokens[part.tokens >= 0]
        np.testing.assert_array_equal(np.sort(inside), np.arange(grid[0] * grid[1]))
        if all(length % size == 0 for length, size in zip(grid, window, strict=True)):
            assert (np.diff(order[part.tokens], axis=1) != 1).sum(axis=1).max() < most


@settings(max_examples=25, deadline=None)
@given(
    grid=st.tuples(st.integers(2, 9), st.integers(2, 9)),
    window=st.integers(2, 6),
    heads=st.integers(1, 3),
    size=st.integers(1, 9),
    images_of=st.integers(1, 5),
)
def test_swin__blocks_of_any_grid_window_and_heads_are_torchs(
    *, grid: tuple[int, int], window: int, heads: int, size: int, images_of: int
) -> None:
    model = tiny(
        img_size=(2 * grid[0], 2 * grid[1]),
        window_size=window,
        depths=(2,),
        num_heads=(heads,),
        head_dim=size,
    )
    assert_same(model, (images_of,))


def test_exponential__masked_neighbours_take_no_longer() -> None:
    """The share of a masked neighbour, e^-100, is 0 and no denormal number, with which all is slow."""
    with torch.no_grad():
        x = torch.tensor([[-100.0], [-87.8], [-87.0], [0.0]])
    np.testing.assert_allclose(exponentials(x.numpy())[:2], 0)
    np.testing.assert_allclose(exponentials(x.numpy())[2:], np.exp(x.numpy()[2:]), rtol=1e-6)
