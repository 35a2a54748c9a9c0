"""INT8 of every known family, run by its engine: convolutions too, functional layers, equal weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import timm
import torch
from commands import Run
from image_tables import VIT, images, table, tiny, write
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from pruners import find_layers, prune
from pruners.errors import InputError
from pruners.model.layers import has_attention
from pruners.model.masks import MaskSet
from trainers.checkpoint.folder import save_checkpoint
from trainers.data.preprocessing import preprocessing_of
from trainers.deploy.checked import torch_answers
from trainers.deploy.formats import FORMATS, Source, check_packable
from trainers.engines.agreement import Agreement
from trainers.engines.registry import ANY_BATCH, ENGINES, Placement
from trainers.export.onnx import quantize_onnx
from trainers.models import factory
from trainers.quantization import int8_folder
from trainers.quantization.checks import check_mode, check_share
from trainers.quantization.int8_onnx import _by_content, _rename, _separate_weights, read_weights

_SMALL: dict[str, Any] = {"img_size": 32, "embed_dim": 16, "patch_size": 8, "num_heads": 2, "depth": 2}
_STAGES: dict[str, Any] = {"depths": (1, 1, 1, 1), "embed_dims": (8, 16, 24, 32), "num_vit": 1}
_WINDOWS: dict[str, Any] = {"img_size": 32, "window_size": 4, "embed_dim": 8, "depths": [1, 1]}
FAMILIES: dict[str, dict[str, Any]] = {
    "test_resnet": {},
    "test_efficientnet": {},
    "test_convnext": {},
    "efficientformer_l1": {**_STAGES, "depths": (1, 1, 1, 2)},
    "efficientformerv2_s0": {**_STAGES, "mlp_ratios": ((4,),) * 4},
    "xcit_nano_12_p8_224": {**_SMALL, "cls_attn_layers": 1},
    # wide enough that its position biases, which images do not change, are not the larger part of it
    "swinv2_tiny_window8_256": {**_WINDOWS, "num_heads": [2, 2], "embed_dim": 32},
    "swin_tiny_patch4_window7_224": {**_WINDOWS, "num_heads": [2, 2]},
    "deit_tiny_distilled_patch16_224": _SMALL,
}
# in every 'make test': a CNN with batch norms, and a hierarchical transformer whose qkv is a function
OFTEN = ("test_resnet", "swinv2_tiny_window8_256")
MODELS = pytest.mark.parametrize(
    "name", [pytest.param(item, marks=[] if item in OFTEN else [pytest.mark.long]) for item in FAMILIES]
)


SPARSE = ("swin_tiny_patch4_window7_224", "deit_tiny_distilled_patch16_224")  # that Espalier's engine takes


def small(name: str, pattern: str = "unstructured") -> nn.Module:
    """A pruned one, whose norms have seen images."""
    side = 224 if name == "efficientformer_l1" else 32  # its position table is of 7 × 7
    size = {"input_size": (3, side, side), "crop_pct": 1.0}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = timm.create_model(name, num_classes=3, pretrained_cfg_overlay=size, **FAMILIES[name])
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                if parameter.ndim == 1 and not key.endswith("bias"):
                    parameter.uniform_(0.5, 1.5)  # a ResNet's blocks begin as nothing
            model.train()
            for _ in range(3):
                model(torch.randn(8, 3, side, side))
    prune(model.eval(), "magnitude", 0.5, pattern=pattern)
    return model


@MODELS
def test_int8_families__static_runs_at_every_batch_size(name: str, tmp_path: Path) -> None:
    model = small(name)
    masks = MaskSet.from_zeros(model, find_layers(model))
    save_checkpoint(
        tmp_path / "float", model, model_args=FAMILIES[name], masks=masks, record={"method": "magnitude"}
    )
    (tmp_path / "int8").mkdir()
    batch = images(64, side=factory.input_size(model)[1])
    record = int8_folder.quantize_folder(tmp_path / "float", tmp_path / "int8", "static", batch.split(16))
    assert record["zeros"] == sum(masks.pruned().values()) > 0
    assert record["int8_share"] > 0.6
    engine = int8_folder.Int8Model(tmp_path / "int8" / "model.onnx", threads=1)
    answers = engine(batch)
    apart = Agreement.of(answers.numpy(), torch_answers(model, batch.numpy()))
    # that the engine answers as torch's own INT8 does is checked where the file is written
    assert_as_int8(apart)
    for count in (1, 2, 7):
        torch.testing.assert_close(engine(batch[:count]), answers[:count], rtol=1e-3, atol=1e-5)


@pytest.mark.long
@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("name", FAMILIES)
def test_int8_families__every_family_exports_to_every_format(name: str, form: str, tmp_path: Path) -> None:
    _exports(name, form, tmp_path)


@pytest.mark.parametrize("form", ["onnx-int8", "openvino-int8"])
def test_int8_families__a_cnn_exports_to_int8(form: str, tmp_path: Path) -> None:
    _exports("test_efficientnet", form, tmp_path)


def _exports(name: str, kind: str, folder: Path) -> None:
    form = FORMATS[kind]
    model = small(name, "1x4" if kind == "sparse-int8" else "unstructured")
    if form.engine == "sparse" and name not in SPARSE:
        with pytest.raises(InputError, match=rf"key = 'sparse': {type(model).__name__} cannot be packed"):
            check_packable(model, "key")  # what every command asks before it begins
        return
    if form.engine == "sparse" and ENGINES[form.engine].lacking(form.kind, "cpu") is not None:
        with pytest.raises(InputError, match=f"'{kind}': this processor has no AVX-512 VNNI"):
            form.check(kind, None)  # what every command asks before it begins
        return
    batch = images(32, side=factory.input_size(model)[1]).numpy()
    form.write(Source(model, preprocessing_of(model), batch), folder)
    if form.int8_values is not None:
        assert form.int8_values(folder) > 0.6 * sum(item.numel() for item in model.parameters())
    run = ANY_BATCH[form.engine].load(folder / form.file, form.kind, Placement(1))
    expected = torch_answers(model, batch)
    for count in (1, 2, 7):
        apart = Agreement.of(run(batch[:count].copy()), expected[:count])
        if form.kind == "float32":
            assert apart.holds(form.kind), apart
        else:
            assert_as_int8(apart)


def assert_as_int8(apart: Agreement) -> None:
    """What INT8 itself costs untrained networks of random norms, in every engine (trained ones lose less)."""
    assert apart.relative < 0.15, apart
    assert apart.top1 > 0.9, apart


def test_int8_families__what_no_way_of_quantizing_does_is_known_from_the_model() -> None:
    with torch.device("meta"):
        cnn, vit, convnext = (
            timm.create_model(name) for name in ("resnet18", "vit_tiny_patch16_224", "convnext_tiny")
        )
    with pytest.raises(InputError, match=r"mode = 'dynamic': leaves convolutions in float32: 96 % of ResNet"):
        check_mode(cnn, "dynamic", (), "mode")
    with pytest.raises(InputError, match="ResNet has batch norms"):
        check_mode(cnn, "qat", (), "mode")
    check_mode(cnn, "static", (), "mode")
    for other in (vit, convnext):
        check_mode(other, "dynamic", [layer.name for layer in find_layers(other)], "mode")
        check_mode(other, "qat", (), "mode")
    with pytest.raises(InputError, match=r"patch_embed\.proj\.weight among them, which is pruned"):
        check_mode(vit, "dynamic", ["patch_embed.proj.weight"], "mode")
    weights = sum(item.numel() for item in cnn.parameters())
    with pytest.raises(InputError, match="49 % of its weights would be int8: such a file is no INT8 one"):
        check_share(round(0.49 * weights), cnn)
    check_share(round(0.51 * weights), cnn)


def test_int8_families__who_is_a_transformer() -> None:
    with torch.device("meta"):
        cnn, swin = map(timm.create_model, ("resnet18", "swin_tiny_patch4_window7_224"))
    assert not has_attention(cnn)
    assert has_attention(swin)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("files")
    model = small("test_resnet")
    save_checkpoint(folder / "cnn", model, model_args={}, masks=None, record={"method": "dense"})
    write(folder / "train.parquet", table([0, 1, 2] * 8))
    return folder


@pytest.mark.parametrize(
    ("typed", "says"),
    [
        ("quantize @/cnn --mode dynamic --out out", ("--mode", "leaves convolutions in float32", "static")),
        (
            "quantize @/cnn --mode qat --train @/train.parquet --out out",
            ("--mode", "has batch norms", "take static"),
        ),
        ("export @/cnn out --format onnx-int8", ("--calibration", "leaves convolutions in float32")),
        ('inspect ""', ("model = ''", "is empty")),
        ('evaluate "" --data @/train.parquet', ("model = ''", "is empty")),
        ('export "" out --format onnx', ("model = ''", "is empty")),
    ],
)
def test_int8_families__it_is_refused_before_work_begins(typed: str, says: tuple[str, ...], run: Run) -> None:
    status, out, error = run(typed)
    assert (status, out, len(error.splitlines())) == (2, "", 1), error
    assert not [part for part in says if part not in error], error
    assert not list(Path().iterdir())


@pytest.mark.parametrize("mode", ["dynamic", "static"])
def test_int8_families__weights_that_are_equal(mode: Any, tmp_path: Path) -> None:
    """The exporter keeps one of them; each is found in the file by its name."""
    model, arguments = tiny(VIT)
    names = [f"blocks.{block}.{layer}.weight" for block in (0, 1) for layer in ("mlp.fc1", "attn.proj")]
    with torch.no_grad():
        for name in names:
            model.get_parameter(name).zero_()
    masks = MaskSet.from_zeros(model, find_layers(model))
    save_checkpoint(tmp_path / "float", model, model_args=arguments, masks=masks, record={"method": "lamp"})
    (tmp_path / "int8").mkdir()
    record = int8_folder.quantize_folder(tmp_path / "float", tmp_path / "int8", mode, [images(16)])
    assert record["zeros"] == sum(masks.pruned().values())
    assert set(names) <= read_weights(tmp_path / "int8" / "model.onnx").keys()


def test_int8_families__a_weight_that_the_engine_transposes_is_read_as_timm_lays_it_out(
    tmp_path: Path,
) -> None:
    """``Gemm`` takes a square weight as it is, and its INT8 form transposed."""
    weight = np.random.default_rng(0).standard_normal((8, 8)).astype(np.float32)
    weight[np.triu_indices(8, 1)] = 0
    gemm = helper.make_node("Gemm", ["images", "w", "b"], ["logits"], name="gemm", transB=1)
    graph = helper.make_graph(
        [gemm],
        "one",
        [helper.make_tensor_value_info("images", TensorProto.FLOAT, ["n", 8])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["n", 8])],
        [numpy_helper.from_array(weight, "w"), numpy_helper.from_array(np.zeros(8, np.float32), "b")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    _separate_weights(model)
    onnx.save(model, tmp_path / "float.onnx")
    quantize_onnx(tmp_path / "float.onnx", tmp_path / "int8.onnx")
    names = _by_content(model, {"layer.weight": torch.from_numpy(weight)})
    written = onnx.load(tmp_path / "int8.onnx")
    _rename(written, {f"{old}_quantized": new for old, new in names.items()})
    onnx.save(written, tmp_path / "int8.onnx")
    values = read_weights(tmp_path / "int8.onnx")["layer.weight"].values
    assert not values[np.triu_indices(8, 1)].any()
    assert values[np.tril_indices(8, -1)].any()
