"""The sparse engine in a server, without torch, timm, Ray, MLflow: from a picture to the name of a class."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from image_tables import png
from PIL import Image

from pruners import prune
from trainers.data.preprocessing import preprocessing_of
from trainers.sparse import load
from trainers.sparse.images import prepared
from trainers.sparse.packing import pack

GUIDE = Path(__file__).parents[3] / "docs/guides/sparse_engine.md"
ROOT = Path(__file__).parents[3]
ALLOWED = {"numpy", "llvmlite", "safetensors", "PIL", "pruners", "trainers"}
BLOCK = """
import importlib.abc, json, sys
class Block(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        top = name.partition(".")[0]
        if top in {"torch", "timm", "ray", "mlflow", "pyarrow", "pydantic", "numba"}:
            raise ModuleNotFoundError(f"No module named {name!r}: blocked")
sys.meta_path.insert(0, Block())
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A packed model with names of classes."""
    torch.manual_seed(0)
    size = {"input_size": (3, 32, 32), "crop_pct": 0.875, "interpolation": "bicubic"}
    model = timm.create_model(
        *("vit_tiny_patch16_224",),
        **{"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3, "num_classes": 3},
        pretrained_cfg_overlay=size,
    ).eval()
    torch.nn.init.normal_(model.head.weight)
    prune(model, "magnitude", 0.9)
    made = tmp_path_factory.mktemp("model")
    pack(model, made / "out", preprocessing=preprocessing_of(model, ["ash", "birch", "cedar"]))
    torch.save(model.state_dict(), made / "weights.pt")
    (made / "cat.jpg").write_bytes(png(1, side=70))
    with torch.inference_mode():
        transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
        logits = model(transform(Image.open(made / "cat.jpg").convert("RGB"))[None])[0]
    (made / "expected.json").write_text(json.dumps(logits.softmax(0).tolist()))
    return made


def test_serving__the_guides_example_runs_where_torch_is_not(folder: Path) -> None:
    text = GUIDE.read_text(encoding="utf-8").partition("## Serving")[2]
    example = text.partition("```python\n")[2].partition("```")[0]
    ending = (
        "print(json.dumps([prediction.label, prediction.name, prediction.probabilities.tolist()]))\n"
        "print(sorted({name.partition('.')[0] for name, module in sys.modules.items()"
        " if 'site-packages' in (getattr(module, '__file__', None) or '')}))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", f"{BLOCK}{example}\n{ending}"],
        cwd=folder,
        env={"PYTHONPATH": str(ROOT), "PATH": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    *_, answer, used = done.stdout.strip().splitlines()
    label, name, shares = json.loads(answer)
    expected = json.loads((folder / "expected.json").read_text())
    assert np.allclose(shares, expected, atol=1e-4)
    assert label == int(np.argmax(expected))
    assert name == ["ash", "birch", "cedar"][label]
    assert set(used.strip("[]").replace("'", "").split(", ")) <= ALLOWED | {"_distutils_hack"}


def test_serving__many_images_are_answered_in_passes(folder: Path) -> None:
    model = load(folder / "out", threads=2)
    picture = Image.open(folder / "cat.jpg")
    others = [Image.new("RGB", (40, 50), (10 * number, 0, 0)) for number in range(20)]
    predictions = model.predict([*others, picture])
    assert len(predictions) == 21
    alone = model.predict([folder / "cat.jpg"])[0]
    assert np.allclose(predictions[-1].probabilities, alone.probabilities, atol=1e-6)
    assert alone.probabilities.sum() == pytest.approx(1)
    assert model.predict([]) == []


@pytest.mark.parametrize("side", [(224, 224), (160, 96), (24, 40)], ids=["square", "high", "wide"])
@pytest.mark.parametrize("mode", ["center", "squash", "border"])
@pytest.mark.parametrize("crop", [0.875, 0.9, 0.95, 1.0])
def test_images__an_image_is_prepared_as_timm_does(crop: float, mode: str, side: tuple[int, int]) -> None:
    """To the pixel: wide and high pictures, larger and smaller than the input, with odd sides."""
    about = {
        "input_size": (3, *side),
        "mean": (0.5, 0.4, 0.3),
        "std": (0.2, 0.3, 0.4),
        "interpolation": "bicubic",
        "crop_pct": crop,
        "crop_mode": mode,
    }
    transform = timm.data.create_transform(**about, is_training=False)
    random = np.random.default_rng(0)
    for width, height in ((437, 300), (211, 533), (301, 57), (640, 427), (70, 50), (33, 33)):
        pixels = random.integers(0, 256, (height // 8 + 1, width // 8 + 1, 3), np.uint8)
        picture = Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC)
        assert np.allclose(prepared(picture, about), transform(picture).numpy(), atol=1e-5), (width, height)


def test_images__a_file_that_is_no_image_is_an_os_error(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "note.txt").write_text("no image")
    with pytest.raises(OSError, match="cannot identify"):
        load(folder / "out").predict([tmp_path / "note.txt"])
    with pytest.raises(FileNotFoundError):
        load(folder / "out").predict([tmp_path / "none.jpg"])
