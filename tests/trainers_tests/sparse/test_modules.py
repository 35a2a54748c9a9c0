"""Linear layers of any model on the sparse kernel, and the sparsity from which that is worth it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from trainers.sparse import break_even as break_even_module
from trainers.sparse.break_even import break_even, crossing, measure_break_even
from trainers.sparse.modules import SparseLinear, sparse_linear_modules


def masked(model: nn.Module, sparsity: float = 0.8) -> nn.Module:
    torch.manual_seed(0)
    with torch.no_grad():
        for name, module in model.named_modules():
            if isinstance(module, nn.Linear) and "head" not in name:
                module.weight.mul_(torch.rand_like(module.weight) >= sparsity)
    return model.eval()


@settings(max_examples=40, deadline=None)
@given(
    shape=st.lists(st.integers(0, 9), max_size=3),
    inputs=st.integers(1, 40),
    outputs=st.integers(1, 40),
    bias=st.booleans(),
    threads=st.integers(1, 2),
)
def test_modules__a_layer_is_torchs(
    shape: list[int], inputs: int, outputs: int, bias: bool, threads: int
) -> None:
    dense = masked(nn.Linear(inputs, outputs, bias=bias), 0.6)
    layer = SparseLinear(dense, threads=threads)
    for _ in range(2):
        x = torch.randn(*shape, inputs)
        with torch.no_grad():
            torch.testing.assert_close(layer(x), dense(x), rtol=1e-4, atol=1e-5)
    x = torch.randn(inputs, 3).T  # not contiguous
    with torch.no_grad():
        torch.testing.assert_close(layer(x), dense(x), rtol=1e-4, atol=1e-5)


def test_modules__inputs_of_another_type_are_named() -> None:
    with pytest.raises(ValueError, match=r"not torch.float64 on cpu"):
        SparseLinear(nn.Linear(2, 2))(torch.zeros(1, 2, dtype=torch.float64))


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("levit_128s", {}),
        ("mixer_s32_224", {"img_size": 64}),
        ("swinv2_tiny_window8_256", {"img_size": 64, "window_size": 4, "depths": (1, 1)}),
        ("xcit_nano_12_p16_224", {"depth": 1}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_modules__the_layers_of_a_model_that_is_not_packed(name: str, options: dict[str, Any]) -> None:
    if name == "swinv2_tiny_window8_256":
        options = {**options, "num_heads": (2, 4), "embed_dim": 32}
    model = masked(timm.create_model(name, num_classes=3, **options))
    size = getattr(model, "img_size", None) or options.get("img_size", 224)
    images = torch.randn(2, 3, size, size)
    with torch.no_grad():
        expected = model(images)
    swapped = sparse_linear_modules(model, images, sparse_from=0.5)
    assert swapped.sparse
    assert all(isinstance(model.get_submodule(layer), SparseLinear) for layer in swapped.sparse)
    with torch.no_grad():
        torch.testing.assert_close(
            model(images), expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max())
        )


class Reader(nn.Module):
    """Reads the weight of one of its layers itself."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.read = nn.Linear(4, 4), nn.Linear(4, 4)
        self.attention = nn.MultiheadAttention(4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x) @ self.read.weight
        return self.attention(x, x, x)[0]


def test_modules__layers_that_cannot_be_taken_stay_and_are_named() -> None:
    model = masked(Reader(), 0.9)
    swapped = sparse_linear_modules(model, torch.randn(3, 4), sparse_from=0.3)
    assert swapped.sparse == ("first",)
    assert "is read elsewhere" in swapped.left["read"]
    assert "NonDynamicallyQuantizableLinear" in swapped.left["attention.out_proj"]


def test_modules__a_model_without_zeros_is_refused_with_the_reasons() -> None:
    model = Reader()
    with pytest.raises(ValueError, match=r"1 have less than 50% zeros; .*: read is not called"):
        sparse_linear_modules(model, torch.randn(3, 4), sparse_from=0.5)


def test_break_even__is_measured_once_and_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(break_even_module, "measure_break_even", lambda: 0.25)
    assert break_even(tmp_path) == 0.25
    monkeypatch.setattr(break_even_module, "measure_break_even", lambda: pytest.fail("measured again"))
    assert break_even(tmp_path) == 0.25
    (file,) = tmp_path.iterdir()
    known = json.loads(file.read_text())
    file.write_text(json.dumps({"another processor": 0.5}))
    monkeypatch.setattr(break_even_module, "measure_break_even", lambda: 0.3)
    assert break_even(tmp_path) == 0.3
    assert json.loads(file.read_text()) == {"another processor": 0.5, **dict.fromkeys(known, 0.3)}
    file.write_text("no JSON")
    assert break_even(tmp_path) == 0.3


def test_break_even__without_a_cache_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(break_even_module, "measure_break_even", lambda: 0.25)
    (tmp_path / "file").touch()
    assert break_even(tmp_path / "file") == 0.25


def test_break_even__what_is_measured_is_a_share() -> None:
    assert 0 < measure_break_even() < 1


def test_break_even__lines_cross_where_they_meet() -> None:
    assert crossing(3.0, (0.2, 0.6), (4.0, 2.0)) == pytest.approx(0.4)
    assert crossing(1.0, (0.2, 0.6), (4.0, 3.9)) == 1.0
    assert crossing(9.0, (0.2, 0.6), (4.0, 2.0)) == 0.0
    assert crossing(1.0, (0.2, 0.6), (2.0, 2.0)) == 1.0
    np.testing.assert_allclose(crossing(3.0, (0.2, 0.6), (2.0, 2.5)), 0.6)
