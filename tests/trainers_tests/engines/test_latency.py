"""Measuring a latency table: which layers, with which zeros, and whether it foretells what a model takes."""

from __future__ import annotations

import statistics
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from helpers import quick
from hypothesis import given
from hypothesis import strategies as st
from image_tables import SWIN, VIT, dense_folder, normed_folder, tiny

from pruners import find_layers, prune
from pruners.errors import InputError
from pruners.model.sparsity_pattern import Pattern
from trainers.checkpoint.folder import save_checkpoint
from trainers.config.engines import Choice
from trainers.engines import latency
from trainers.engines.latency import LAYER_SPARSITIES, Target, linear_shapes, measure, pruned_at, sparsities
from trainers.engines.latency_table import LatencyTable, LinearShape
from trainers.engines.process import EngineProcess
from trainers.engines.registry import Placement, load
from trainers.sparse.break_even import break_even
from trainers.sparse.single import SingleLinear

UNSTRUCTURED = Pattern()
WIDE = {"img_size": 32, "patch_size": 4, "embed_dim": 192, "depth": 2, "num_heads": 3}


def target(engine: str, batch: int = 1) -> Target:
    return Target(Choice.parse(engine), Placement(1), batch)


def test_latency__layers_are_known_by_what_they_multiply() -> None:
    """A ViT's for each of 4 patches and the class; a Swin's for a quarter of them in each stage."""
    model, _ = tiny(VIT)
    shapes = linear_shapes(model, find_layers(model))
    assert shapes["blocks.1.attn.qkv.weight"] == LinearShape(48, 16, 5)
    assert len(shapes) == 8
    assert set(shapes.values()) == {
        LinearShape(*sizes, 5) for sizes in ((48, 16), (16, 16), (64, 16), (16, 64))
    }
    model, _ = tiny(SWIN)
    shapes = linear_shapes(model, find_layers(model))
    assert shapes["layers.0.blocks.0.mlp.fc1.weight"] == LinearShape(32, 8, 16)
    assert shapes["layers.1.blocks.0.mlp.fc1.weight"] == LinearShape(64, 16, 4)


def test_latency__convolutions_are_a_part_of_the_rest() -> None:
    model = timm.create_model("resnet10t", num_classes=3)
    layers = find_layers(model)
    assert layers
    assert linear_shapes(model, layers) == {}


@pytest.mark.parametrize("pattern", ["unstructured", "1x4", "2:4"])
@quick(30)
@given(st.integers(1, 9), st.integers(1, 9), st.floats(0.0, 0.99), st.integers(0, 5))
def test_latency__zeros_are_as_many_as_asked_and_keep_the_pattern(
    pattern: str, outputs: int, groups: int, sparsity: float, seed: int
) -> None:
    form = Pattern.parse(pattern)
    sparsity = form.forced or sparsity
    weight = pruned_at(LinearShape(outputs, 4 * groups, 1), sparsity, form, np.random.default_rng(seed))
    zeros = weight == 0
    assert weight.dtype == np.float32
    assert sparsity <= zeros.mean() < sparsity + form.unit / zeros.size + 1e-9
    each = zeros.reshape(-1, 4).sum(1)
    if pattern == "1x4":
        assert set(each) <= {0, 4}
    if pattern == "2:4":
        assert set(each) == {2}


def test_latency__a_pattern_that_leads_to_one_sparsity_is_timed_there() -> None:
    assert sparsities(Pattern.parse("2:4")) == (0.0, 0.5)
    assert sparsities(Pattern.parse("1x4")) == LAYER_SPARSITIES


@pytest.mark.parametrize("engine", ["csr", "torch", "onnxruntime", "openvino"])
def test_latency__a_layer_alone_is_that_layer_on_every_engine(engine: str, tmp_path: Path) -> None:
    shape = LinearShape(12, 8, 5)
    weight = pruned_at(shape, 0.9, UNSTRUCTURED, np.random.default_rng(0))
    choice = Choice.parse(engine)
    run = load(choice, latency._layer_file(weight, choice, tmp_path / "layer"), Placement(1))
    for batch in (1, 3):
        inputs = np.random.default_rng(1).standard_normal((batch, 1, 5, 8), np.float32)
        assert np.allclose(run(inputs), inputs @ weight.T, atol=1e-5)


@pytest.mark.parametrize("sparsity", [0.0, 0.9])
def test_latency__a_layer_alone_on_the_sparse_engine_stays_in_tiles(sparsity: float, tmp_path: Path) -> None:
    """As inside a model: what is timed is no change of order."""
    shape = LinearShape(12, 8, 70)
    weight = pruned_at(shape, sparsity, UNSTRUCTURED, np.random.default_rng(0))
    choice = Choice.parse("sparse")
    run = load(choice, latency._layer_file(weight, choice, tmp_path / "layer"), Placement(2))
    assert isinstance(run, SingleLinear)
    for batch in (1, 3, 1):
        inputs = np.random.default_rng(batch).standard_normal((batch, 1, 70, 8), np.float32)
        for _ in range(2):
            tiles = run(inputs)
        assert np.allclose(run.outputs(), inputs @ weight.T, atol=1e-5)
        assert tiles.ndim == 1


@pytest.mark.parametrize("engine", ["onnxruntime", "openvino", "sparse"])
def test_latency__engines_that_read_files(
    engine: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(latency, "sparsities", lambda pattern, free=(): (0.0, 0.9))
    folder = dense_folder(tmp_path / "dense")
    shapes = {"blocks.0.attn.qkv.weight": LinearShape(48, 16, 5)}
    whole, curves = measure(folder, shapes, target(engine, 2), UNSTRUCTURED, 1)
    timed = (0.0, np.nextafter(break_even(), 0), 0.9) if engine == "sparse" else (0.0, 0.9)
    assert whole.sparsities == timed
    assert min(whole.seconds) > 0
    assert list(curves) == list(shapes.values())
    (curve,) = curves.values()
    assert curve.sparsities == timed
    assert min(curve.seconds) > 0


def test_latency__an_engine_that_fails_is_told_in_a_line(tmp_path: Path) -> None:
    folder = dense_folder(tmp_path / "dense")
    broken = Target(Choice("csr", "nothing"), Placement(1), 1)
    with pytest.raises(RuntimeError, match="csr:nothing cannot be timed") as raised:
        measure(folder, {}, broken, UNSTRUCTURED, 1)
    assert len(str(raised.value).splitlines()) == 1


def test_latency__a_model_that_the_sparse_engine_lacks_is_named(tmp_path: Path) -> None:
    folder = normed_folder(tmp_path / "dense")
    with pytest.raises(InputError, match=r"model = 'ResNet': the sparse engine: .*ResNet"):
        measure(folder, {}, target("sparse"), UNSTRUCTURED, 1)


@pytest.mark.parametrize("engine", ["torch", "csr", "sparse"])
def test_latency__a_table_foretells_what_a_vit_takes(
    engine: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That of one with 95 % zeros within a factor of 3, as the machine may be busy."""
    monkeypatch.setattr(latency, "sparsities", lambda pattern, free=(): (0.0, 0.5, 0.95))
    size = {"input_size": (3, 32, 32), "crop_pct": 1.0}
    torch.manual_seed(0)
    model = timm.create_model(VIT, num_classes=3, pretrained_cfg_overlay=size, **WIDE).eval()
    record = {"method": "dense", "sparsity": 0.0, "allocation": {}}
    save_checkpoint(tmp_path / "dense", model, model_args=WIDE, masks=None, record=record)
    shapes = linear_shapes(model, find_layers(model))
    on = target(engine)
    whole, curves = measure(tmp_path / "dense", shapes, on, UNSTRUCTURED)
    table = LatencyTable({}, whole, shapes, curves)
    assert len(curves) == 4
    for curve in curves.values():
        if engine == "csr":  # a layer with fewer zeros than half is run as a dense one
            assert curve.at(0.49) == pytest.approx(curve.at(0.0))
            assert len(curve.sparsities) == 4
        if engine == "sparse":
            assert curve.at(break_even() - 1e-6) == pytest.approx(curve.at(0.0))
        assert all(low < high for low, high in pairwise(curve.sparsities))
    report = prune(model, "magnitude", 0.95)
    save_checkpoint(tmp_path / "pruned", model, model_args=WIDE, masks=report.masks, record=record)
    (tmp_path / "scratch").mkdir()
    file, images = latency._whole(tmp_path / "pruned", on, tmp_path / "scratch")
    with EngineProcess(on.choice, file, on.placement, images) as process:
        took = statistics.median(process.seconds(1, 10) for _ in range(7))
    assert table.at({}) >= whole.at(0.0) * (1 - 1e-9)
    assert 1 / 3 < table.at(report.allocation) / took < 3
