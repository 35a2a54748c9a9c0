"""The files that make a checkpoint folder an MLflow model: what they hold, and what they answer."""

from __future__ import annotations

import io
import json
import re
import sys
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from shutil import copytree
from typing import Any

import mlflow
import numpy as np
import pandas as pd
import pytest
import timm
import torch
from image_tables import VIT, dense_folder, edit_json, png, tiny
from PIL import Image
from timm.models.vision_transformer import VisionTransformer

from orchestration.tracking import served_model
from orchestration.tracking.pyfunc_model import CODE, classes_of, model_files
from pruners import prune
from trainers.checkpoint.folder import load_checkpoint, save_checkpoint
from trainers.quantization import int8_folder
from trainers.sources.parquet import decode
from trainers.sparse.runtime import SparseModel

CLASSES = {"ash": 1, "birch": 0, "cedar": 2}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dense checkpoint that MLflow can load."""
    made = dense_folder(tmp_path_factory.mktemp("model") / "checkpoint")
    with model_files(CLASSES) as files:
        assert not {path.name for path in files.iterdir()} & {path.name for path in made.iterdir()}
        copytree(files, made, dirs_exist_ok=True)
    return made


@pytest.fixture(scope="module")
def model(folder: Path) -> Iterator[mlflow.pyfunc.PyFuncModel]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_ALLOW_PICKLE_DESERIALIZATION", "false")
        yield mlflow.pyfunc.load_model(str(folder))


def plain_timm(folder: Path, content: bytes) -> torch.Tensor:
    """Shares of the classes, by timm alone."""
    loaded = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(loaded), is_training=False)
    with torch.no_grad():
        logits = loaded(transform(Image.open(io.BytesIO(content)).convert("RGB"))[None])
    shares: torch.Tensor = logits.softmax(1)[0]
    return shares


def test_pyfunc_model__it_answers_as_plain_timm_does(folder: Path, model: mlflow.pyfunc.PyFuncModel) -> None:
    pictures = [png(number) for number in range(70)]  # more than fit into one pass
    answers = model.predict(pd.DataFrame({"image": pictures}))
    assert len(answers) == len(pictures)
    names = {label: name for name, label in CLASSES.items()}
    for number in (0, 1, 64, 69):
        expected = plain_timm(folder, pictures[number])
        row = answers.iloc[number]
        assert row["probabilities"] == pytest.approx(expected.tolist(), abs=1e-5)
        assert row["class"] == int(expected.argmax())
        assert row["label"] == names[row["class"]]


def test_pyfunc_model__it_is_still_a_checkpoint(folder: Path, tmp_path: Path) -> None:
    dense_folder(tmp_path)
    loaded = load_checkpoint(str(folder)).model
    for name, weight in load_checkpoint(str(tmp_path)).model.state_dict().items():
        assert torch.equal(weight, loaded.state_dict()[name])


def test_pyfunc_model__labels_are_the_models_own_where_the_data_names_none(tmp_path: Path) -> None:
    dense_folder(tmp_path)
    with model_files() as files:
        copytree(files, tmp_path, dirs_exist_ok=True)
    picture = pd.DataFrame({"image": [png(1)]})
    assert mlflow.pyfunc.load_model(str(tmp_path)).predict(picture)["label"].tolist() == [None]
    edit_json(tmp_path / "config.json", label_names=["x", "y", "z"])
    row = mlflow.pyfunc.load_model(str(tmp_path)).predict(picture).iloc[0]
    assert row["label"] == "xyz"[row["class"]]


def test_pyfunc_model__a_bad_image_is_named(model: mlflow.pyfunc.PyFuncModel) -> None:
    with pytest.raises(ValueError, match=r"image 1 cannot be decoded \(no image of a known format\)"):
        model.predict(pd.DataFrame({"image": [png(1), b"no image"]}))
    with pytest.raises(mlflow.exceptions.MlflowException, match="image"):
        model.predict(pd.DataFrame({"picture": [png(1)]}))


def test_pyfunc_model__the_example_is_an_image_that_it_answers(
    folder: Path, model: mlflow.pyfunc.PyFuncModel
) -> None:
    example = model.input_example
    assert Image.open(io.BytesIO(example["image"].iloc[0])).size == (32, 32)
    answer = model.predict(example).iloc[0]
    assert sum(answer["probabilities"]) == pytest.approx(1.0)
    schema = model.metadata.signature
    assert [(column.name, column.type.name) for column in schema.inputs.inputs] == [("image", "binary")]
    assert schema.outputs.input_names() == ["class", "label", "probabilities"]


def test_pyfunc_model__an_int8_model_is_served_by_its_engine(folder: Path, tmp_path: Path) -> None:
    """With its own names of classes, where the data has none; and as near its parent as INT8 comes."""
    parent = dense_folder(tmp_path / "parent")
    served = tmp_path / "int8"
    served.mkdir()
    int8_folder.quantize_folder(parent, served, "dynamic", labels=["x", "y", "z"])
    with model_files(reader=int8_folder.ENGINE) as files:
        assert not {path.name for path in files.iterdir()} & {path.name for path in served.iterdir()}
        copytree(files, served, dirs_exist_ok=True)
    assert int8_folder.read_record(served, "served", key="model")["mode"] == "dynamic"
    needs = {line.split("==")[0] for line in (served / "requirements.txt").read_text().splitlines()}
    assert needs == {"mlflow", "torch", "torchvision", "timm", "pillow", "onnxruntime"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_ALLOW_PICKLE_DESERIALIZATION", "false")
        patch.setattr(timm, "create_model", None)
        answers = mlflow.pyfunc.load_model(str(served)).predict(
            pd.DataFrame({"image": [png(number) for number in range(70)]})
        )
    for number in (0, 69):
        row = answers.iloc[number]
        assert row["probabilities"] == pytest.approx(plain_timm(parent, png(number)).tolist(), abs=0.05)
        assert row["label"] == "xyz"[row["class"]]


@pytest.fixture
def sparse_folder(tmp_path: Path) -> Path:
    """A checkpoint with 90 % zeros that MLflow can load."""
    model, arguments = tiny(VIT)
    pruned = prune(model, "magnitude", 0.9)
    record = {"method": "magnitude", "sparsity": pruned.sparsity, "allocation": pruned.allocation}
    save_checkpoint(tmp_path / "sparse", model, model_args=arguments, masks=pruned.masks, record=record)
    with model_files(CLASSES) as files:
        copytree(files, tmp_path / "sparse", dirs_exist_ok=True)
    return tmp_path / "sparse"


def loaded(
    folder: Path, calls: list[int], patch: pytest.MonkeyPatch, engine_seconds: float = 0.0
) -> mlflow.pyfunc.PyFuncModel:
    """The served model; calls of the sparse engine are counted from then on."""
    called = SparseModel.__call__

    def counted(self: SparseModel, images: Any) -> Any:
        calls.append(len(images))
        time.sleep(engine_seconds)
        return called(self, images)

    patch.setattr(SparseModel, "__call__", counted)
    model = mlflow.pyfunc.load_model(str(folder))
    calls.clear()
    return model


@pytest.mark.parametrize(
    ("asked", "torch_seconds", "by_engine"),
    [("sparse", 0.0, True), ("torch", 1.0, False), ("auto", 0.05, True), ("auto", 0.0, False)],
)
def test_pyfunc_model__a_sparse_model_is_served_by_the_faster_engine_or_the_one_asked_for(
    asked: str, torch_seconds: float, by_engine: bool, sparse_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which is faster is played: torch waits, or the sparse engine does."""
    monkeypatch.setenv("ESPALIER_ENGINE", asked)
    forward, calls = VisionTransformer.forward, list[int]()

    def slow(self: VisionTransformer, images: torch.Tensor) -> torch.Tensor:
        time.sleep(torch_seconds if asked == "auto" else 0)
        return forward(self, images)

    monkeypatch.setattr(VisionTransformer, "forward", slow)
    model = loaded(sparse_folder, calls, monkeypatch, 0.0 if by_engine else 0.05)
    pictures = [png(number) for number in range(3)]
    answers = model.predict(pd.DataFrame({"image": pictures}))
    assert calls == ([3] if by_engine else [])
    for number, picture in enumerate(pictures):
        expected = plain_timm(sparse_folder, picture).tolist()
        assert answers.iloc[number]["probabilities"] == pytest.approx(expected, abs=1e-5)


def test_pyfunc_model__a_dense_model_stays_torchs(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    loaded(folder, calls, monkeypatch).predict(pd.DataFrame({"image": [png(1)]}))
    assert calls == []


def test_pyfunc_model__an_engine_that_is_none_is_named(
    sparse_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ESPALIER_ENGINE", "spars")
    with pytest.raises(ValueError, match="ESPALIER_ENGINE = 'spars': must be one of auto, torch, sparse"):
        mlflow.pyfunc.load_model(str(sparse_folder))
    monkeypatch.setenv("ESPALIER_ENGINE", "sparse")
    monkeypatch.setitem(sys.modules, "trainers.sparse.packing", None)
    with pytest.raises(ValueError, match=r"ESPALIER_ENGINE = 'sparse': .*trainers\.sparse\.packing"):
        mlflow.pyfunc.load_model(str(sparse_folder))
    monkeypatch.setenv("ESPALIER_ENGINE", "auto")
    mlflow.pyfunc.load_model(str(sparse_folder))


def test_pyfunc_model__nothing_is_pickled_and_no_place_is_named(folder: Path) -> None:
    files = {path.name: path for path in folder.rglob("*") if path.is_file()}
    assert set(files) == {
        *("config.json", "model.safetensors", "pruning.json"),
        *("MLmodel", "served_model.py", "classes.json", "input_example.json", "serving_input_example.json"),
        *("requirements.txt", "conda.yaml", "python_env.yaml"),
    }
    for name in files.keys() - {"model.safetensors"}:
        text = files[name].read_text(encoding="utf-8")
        assert not re.search(r"/(tmp|root|home|work|usr)/|https?://|--index|--extra", text), name
        assert str(CODE.parent) not in text, name
    assert files["served_model.py"].read_bytes() == CODE.read_bytes()


def test_pyfunc_model__requirements_are_what_is_installed(folder: Path) -> None:
    pinned = dict(line.split("==") for line in (folder / "requirements.txt").read_text().splitlines())
    assert set(pinned) == {"mlflow", "torch", "torchvision", "timm", "safetensors", "pillow"}
    for name, pinned_version in pinned.items():
        assert version(name).partition("+")[0] == pinned_version


def test_pyfunc_model__the_users_project_stays_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """MLflow copies the lock file of the project it is started in, which may name a private index."""
    (tmp_path / "uv.lock").write_text('source = { registry = "https://user:secret@index/simple" }')
    (tmp_path / "pyproject.toml").write_text("[project]\nname = 'mine'\nversion = '1'\n")
    monkeypatch.chdir(tmp_path)
    with model_files() as files:
        assert not {"uv.lock", "pyproject.toml"} & {path.name for path in files.iterdir()}


def _saved(image: Image.Image, kind: str, **options: object) -> bytes:
    sink = io.BytesIO()
    image.save(sink, kind, **options)
    return sink.getvalue()


def _pictures() -> dict[str, bytes]:
    noise = np.random.default_rng(0).integers(0, 256, (20, 12, 3), dtype=np.uint8)
    turned = Image.Exif()
    turned[0x0112] = 6
    palette = Image.fromarray(noise).convert("P")
    wide = noise[..., 0].astype(np.uint16) * 200
    return {
        "turned by its camera": _saved(Image.fromarray(noise), "JPEG", exif=turned),
        "16 bits": _saved(Image.fromarray(wide), "PNG"),
        "palette with a hole": _saved(palette, "PNG", transparency=3),
        "grey": _saved(Image.fromarray(noise[..., 0]), "PNG"),
        "transparent": _saved(Image.fromarray(np.dstack([noise, noise[..., :1]])), "PNG"),
    }


@pytest.mark.parametrize("name", _pictures())
def test_pyfunc_model__images_are_decoded_as_for_training(name: str) -> None:
    content = _pictures()[name]
    ours, theirs = served_model.decode(content), decode(content)
    assert (ours.mode, ours.size) == (theirs.mode, theirs.size)
    assert ours.tobytes() == theirs.tobytes()


def test_pyfunc_model__class_names_are_found_beside_the_images(tmp_path: Path) -> None:
    assert classes_of(None) is None
    assert classes_of(str(tmp_path)) is None
    assert classes_of(str(tmp_path / "train.parquet")) is None
    (tmp_path / "classes.json").write_text(json.dumps(CLASSES))
    assert classes_of(str(tmp_path)) == CLASSES
