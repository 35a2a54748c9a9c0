"""The INT8 file and its folder: zeros that are 0, answers close to the float model, no machine's places."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pyarrow
import pytest
import torch
from image_tables import SWIN, VIT, edit_json, images
from onnx import numpy_helper
from quantized import SIZE, pruned

from orchestration.benchmark.models import load_variants
from orchestration.export.compress import compress
from pruners.errors import InputError
from pruners.model.masks import MaskSet
from trainers.checkpoint.folder import load_checkpoint, save_checkpoint, weights_hash
from trainers.config.engines import Choice
from trainers.config.quantization import Mode
from trainers.data.preprocessing import PREPROCESSING
from trainers.export.onnx import ONNX_FILE
from trainers.quantization import int8_folder
from trainers.quantization.fake_quant import Prepared
from trainers.quantization.int8_onnx import check_zeros, read_weights

WAYS: tuple[Mode, ...] = ("dynamic", "static", "qat")
LABELS = ["cat", "dog", "fox"]


def written(way: Mode, architecture: str, folder: Path) -> Path:
    """A quantised model; its float parent is ``pruned(architecture)``."""
    model, arguments, masks = pruned(architecture)
    batches, ranges = images(32).split(8), None
    if way == "qat":
        prepared = Prepared(model, SIZE, aware=True)
        prepared.calibrate(batches)
        ranges = prepared.ranges()
    record = {"method": "dimap", "sparsity": masks.sparsity}
    save_checkpoint(folder / "parent", model, model_args=arguments, masks=masks, record=record, ranges=ranges)
    (folder / "int8").mkdir()
    int8_folder.quantize_folder(folder / "parent", folder / "int8", way, batches, labels=LABELS)
    return folder / "int8"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Path]:
    directory = tmp_path_factory.mktemp("int8")
    return {
        (way, architecture): written(way, architecture, directory / f"{way}-{architecture}")
        for way in WAYS
        for architecture in (VIT, SWIN)
    }


CASES = pytest.mark.parametrize("case", [(way, name) for way in WAYS for name in (VIT, SWIN)], ids=":".join)


@CASES
def test_int8_folder__every_pruned_weight_is_0(
    case: tuple[str, str], folders: dict[tuple[str, str], Path]
) -> None:
    """Read from the file by onnx alone: int8 initialisers by their names, and their zero points."""
    _, _, masks = pruned(case[1])
    model = onnx.load(folders[case] / ONNX_FILE)
    tensors = {item.name: numpy_helper.to_array(item) for item in model.graph.initializer}
    zero_points = {}
    for node in model.graph.node:
        if node.op_type in ("DequantizeLinear", "MatMulInteger"):
            weight, point = (0, 2) if node.op_type == "DequantizeLinear" else (1, 3)
            zero_points[node.input[weight]] = tensors[node.input[point]]
    for name, mask in masks.items():
        stored = name if name in tensors else f"{name}.T"
        values = tensors[stored] if stored == name else tensors[stored].T
        assert values.dtype == np.int8
        assert values.shape == tuple(mask.shape)
        assert not values[~mask.numpy()].any()
        assert values[mask.numpy()].any()
        assert not zero_points[stored].any()
    assert check_zeros(folders[case] / ONNX_FILE, masks) == sum(masks.pruned().values())


@CASES
def test_int8_folder__no_pair_of_products_overflows_16_bits(
    case: tuple[str, str], folders: dict[tuple[str, str], Path]
) -> None:
    """255 · 64 · 2 fits; processors without VNNI cut off what does not."""
    for weight in read_weights(folders[case] / ONNX_FILE).values():
        assert np.abs(weight.values.astype(int)).max() <= 64


@CASES
def test_int8_folder__answers_are_close_at_every_batch_size(
    case: tuple[str, str], folders: dict[tuple[str, str], Path]
) -> None:
    model, _, _ = pruned(case[1])
    batch = images(8)
    with torch.no_grad():
        expected = model(batch)
    engine = int8_folder.Int8Model(folders[case] / ONNX_FILE, threads=1)
    for count in range(1, 9):
        logits = engine(batch[:count])
        assert logits.shape == (count, 3)
        assert (logits - expected[:count]).abs().max() < 0.05 * expected.abs().max()


@CASES
def test_int8_folder__the_record_says_how_often_the_class_is_that_of_float32(
    case: tuple[str, str], folders: dict[tuple[str, str], Path]
) -> None:
    model, _, _ = pruned(case[1])
    batch = images(32)
    with torch.no_grad():
        same = int8_folder.Int8Model(folders[case] / ONNX_FILE)(batch).argmax(1) == model(batch).argmax(1)
    record = json.loads((folders[case] / int8_folder.QUANTIZATION_RECORD).read_text())
    assert record["same_class"] == {"images": 32, "share": float(same.double().mean())}


@CASES
def test_int8_folder__the_folder_says_all_and_nothing_of_this_machine(
    case: tuple[str, str], folders: dict[tuple[str, str], Path]
) -> None:
    folder = folders[case]
    record = int8_folder.read_record(folder, "x", key="model")
    assert record["mode"] == case[0]
    assert record["method"] == "dimap"
    assert record["zeros"] == sum(pruned(case[1])[2].pruned().values())
    assert len(record["probe"]["logits"]) == int8_folder.PROBES
    assert record["probe"]["agreement"]["relative"] < 0.15
    assert record["float"] == weights_hash(str(folder.parent / "parent"))
    assert record["engine"].startswith("onnxruntime ")
    assert {path.name for path in folder.iterdir()} == {*record["files"], int8_folder.QUANTIZATION_RECORD}
    assert MaskSet.load(folder / "masks.safetensors").fingerprint() == pruned(case[1])[2].fingerprint()
    metadata = {item.key: item.value for item in onnx.load(folder / ONNX_FILE).metadata_props}
    about = json.loads(metadata[PREPROCESSING])
    assert about["input_size"] == [3, 16, 16]
    assert about["labels"] == LABELS
    source_model = [
        str(Path(__file__).parents[3]),
        str(Path(torch.__file__).parent.parent),
        str(folder.parent),
    ]
    for path in folder.iterdir():
        assert not any(directory.encode() in path.read_bytes() for directory in source_model), path.name


def test_int8_folder__a_weight_that_came_back_is_named(
    folders: dict[tuple[str, str], Path], tmp_path: Path
) -> None:
    """The check can fail: one pruned weight of one layer is set, and so is a zero point."""
    name, (_, _, masks) = "blocks.1.mlp.fc1.weight", pruned(VIT)
    for way, stored in (("static", name), ("dynamic", f"{name}.T")):
        model = onnx.load(folders[way, VIT] / ONNX_FILE)
        tensor = next(item for item in model.graph.initializer if item.name == stored)
        values = numpy_helper.to_array(tensor).copy()
        pruned_at = (~masks[name].numpy() if way == "static" else ~masks[name].numpy().T).nonzero()
        values[pruned_at[0][0], pruned_at[1][0]] = 1
        tensor.CopyFrom(numpy_helper.from_array(values, stored))
        onnx.save(model, tmp_path / "changed.onnx")
        with pytest.raises(RuntimeError, match=rf"{name} has pruned weights that are not 0"):
            check_zeros(tmp_path / "changed.onnx", masks)
    model = onnx.load(folders["static", VIT] / ONNX_FILE)
    node = next(
        item for item in model.graph.node if item.op_type == "DequantizeLinear" and item.input[0] == name
    )
    node.input[2] = "shifted"
    model.graph.initializer.append(numpy_helper.from_array(np.full(64, 1, np.int8), "shifted"))
    onnx.save(model, tmp_path / "changed.onnx")
    with pytest.raises(RuntimeError, match="zero points that are not 0"):
        check_zeros(tmp_path / "changed.onnx", masks)
    with pytest.raises(RuntimeError, match="has no int8 weight"):
        check_zeros(folders["static", VIT] / ONNX_FILE, pruned(SWIN)[2])


def test_int8_folder__an_engine_that_answers_otherwise_is_noticed(
    folders: dict[tuple[str, str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Wrong(int8_folder.Int8Model):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return 1.3 * super().forward(images)

    monkeypatch.setattr(int8_folder, "Int8Model", Wrong)
    with pytest.raises(RuntimeError, match=r"onnxruntime does not answer what torch answers"):
        int8_folder.quantize_folder(folders["static", VIT].parent / "parent", tmp_path, "dynamic")


def test_int8_folder__what_is_quantized_is_not_quantized_again(
    folders: dict[tuple[str, str], Path], tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=r"model = .*is quantised already"):
        int8_folder.quantize_folder(folders["static", VIT], tmp_path, "dynamic", key="model")
    with pytest.raises(InputError, match="is quantised already"):
        load_checkpoint(str(folders["static", VIT]))
    with pytest.raises(InputError, match="was not trained for INT8"):
        int8_folder.quantize_folder(folders["static", VIT].parent / "parent", tmp_path, "qat")
    assert not list(tmp_path.iterdir())


def test_int8_folder__images_of_another_shape(folders: dict[tuple[str, str], Path], tmp_path: Path) -> None:
    parent = folders["static", VIT].parent / "parent"
    with pytest.raises(InputError, match=r"\(3, 32, 32\).*the model takes \(3, 16, 16\)"):
        int8_folder.quantize_folder(parent, tmp_path, "static", [images(4, side=32)])


def test_int8_folder__a_damaged_folder_is_refused(tmp_path: Path) -> None:
    folder = tmp_path
    for name in (ONNX_FILE, "config.json"):
        (folder / name).write_text("{}")
    int8_folder.write_record(folder, pruned(VIT)[2], {})
    assert int8_folder.is_int8(folder)
    int8_folder.read_record(folder, "x", key="model")
    (folder / ONNX_FILE).write_text("{ }")
    with pytest.raises(InputError, match=r"model = 'x': model\.onnx is not the file"):
        int8_folder.read_record(folder, "x", key="model")
    (folder / ONNX_FILE).unlink()
    with pytest.raises(InputError, match=r"model\.onnx is missing"):
        int8_folder.read_record(folder, "x", key="model")
    edit_json(folder / int8_folder.QUANTIZATION_RECORD, files={"../x": ""})
    with pytest.raises(InputError, match="must be a record written by espalier"):
        int8_folder.read_record(folder, "x", key="model")


def test_int8_folder__compressed_and_run(folders: dict[tuple[str, str], Path], tmp_path: Path) -> None:
    """By plain pyarrow and ONNX Runtime, as the guide says, and by us; packed twice it is the same."""
    source = folders["static", VIT]
    packed = tmp_path / "packed"
    lines = compress(str(source), str(packed), None, "runs")
    assert f"{(source / ONNX_FILE).stat().st_size / 1e6:.2f} MB → " in lines[1]
    assert {path.name for path in packed.iterdir()} == {
        int8_folder.PACKED_MODEL,
        "config.json",
        int8_folder.QUANTIZATION_RECORD,
    }
    content = pyarrow.input_stream(str(packed / int8_folder.PACKED_MODEL)).read()
    assert content == (source / ONNX_FILE).read_bytes()
    assert onnxruntime.InferenceSession(content).get_inputs()[0].name == "images"
    packed_model, source_model = (
        int8_folder.load_runnable(str(item), key="model") for item in (packed, source)
    )
    pictures = images(4)
    assert torch.equal(packed_model.model(pictures), source_model.model(pictures))
    assert (packed_model.config, packed_model.classes, packed_model.sparsity) == (
        source_model.config,
        source_model.classes,
        source_model.sparsity,
    )
    assert weights_hash(str(packed)) == weights_hash(str(source))
    compress(str(packed), str(tmp_path / "again"), None, "runs")
    for name in (int8_folder.PACKED_MODEL, int8_folder.QUANTIZATION_RECORD):
        assert (tmp_path / "again" / name).read_bytes() == (packed / name).read_bytes()
    with load_variants([str(packed)], None, None, "runs") as (variant,):
        file = variant.file(Choice.parse("onnxruntime:int8"), tmp_path)
        assert (file.path.read_bytes(), file.size) == (
            content,
            (packed / int8_folder.PACKED_MODEL).stat().st_size,
        )


def test_int8_folder__a_compressed_file_that_is_no_such_one(
    folders: dict[tuple[str, str], Path], tmp_path: Path
) -> None:
    """Also one that would inflate to more than its record says is refused, and not read whole."""
    source = folders["static", VIT]
    int8_folder.pack(source, tmp_path, int8_folder.read_record(source, "x", key="model"))
    record = int8_folder.read_record(tmp_path, "x", key="model")
    for size in (record["bytes"] - 1, record["bytes"] + 1):
        with (
            pytest.raises(InputError, match=rf"does not inflate to {size} bytes"),
            int8_folder.engine_file(tmp_path, record | {"bytes": size}),
        ):
            pass
    (tmp_path / int8_folder.PACKED_MODEL).write_bytes(b"none")
    with pytest.raises(InputError, match=r"model\.onnx\.zst is not the file that"):
        int8_folder.load_runnable(str(tmp_path), key="model")
    with pytest.raises(InputError, match="does not inflate"), int8_folder.engine_file(tmp_path, record):
        pass
