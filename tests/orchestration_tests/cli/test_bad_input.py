"""Bad input by the real command line: one clear line, status 2, and nothing started or left behind."""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import ray
import yaml
from image_tables import VIT, VIT_ARGS, dense_folder, edit_json, table, write

from orchestration.cli import app
from orchestration.cluster import connect
from orchestration.recipe.loading import load_recipe
from orchestration.state.stored_recipe import store
from orchestration.tracking import tracker

ESPALIER = Path(sys.executable).parent / "espalier"
CASES: Mapping[str, Mapping[str, Any]] = yaml.safe_load(
    Path(__file__).with_name("bad_input.yaml").read_text(encoding="utf-8")
)
TRAINED = {"data": {"source": "digits"}, "dense": {"epochs": 1}}
BY_HAND = ("unknown key", "unknown command", "truncated weights", "unknown optimizer")


@pytest.fixture(scope="module")
def bad(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of recipes, images and checkpoints, of which few can be used."""
    folder = tmp_path_factory.mktemp("bad")
    _recipes(folder)
    _images(folder)
    _checkpoints(folder)
    (folder / "empty").mkdir()
    return folder


def _recipes(folder: Path) -> None:
    data = {part: f"{folder}/good/{part}.parquet" for part in ("train", "validation", "test")}
    recipes: dict[str, object] = {
        "own": {"extends": "demo", "model": {"classes": 3}, "data": {"source": None, **data}},
        "ready": {"model": {"checkpoint": f"{folder}/dense", "classes": 3}, "data": data},
        "vit": {**TRAINED, "model": {"architecture": VIT, "args": VIT_ARGS, "classes": 10}},
        "cnn": {**TRAINED, "model": {"architecture": "convnext_atto", "classes": 10}},
        "resnet": {**TRAINED, "model": {"architecture": "test_resnet", "classes": 10}},
        "list": ["demo"],
        "extends": {"extends": "demmo"},
        "circle": {"extends": "circle.yaml"},
        "bare": {"data": {"source": "digits"}},
    }
    for name, content in recipes.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(content))
    store(load_recipe("demo", [f"storage={folder}/begun"]))
    (folder / "broken.yaml").write_text("seed: 1\nmodel: {classes: 3]\n")


def _images(folder: Path) -> None:
    for part in ("train", "validation", "test"):
        write(folder / f"good/{part}.parquet", table([0, 1, 2, 0]))
    good = table([0, 1, 2])
    write(folder / "ten.parquet", table(list(range(10))))
    write(folder / "unlabelled.parquet", good.drop_columns("label"))
    write(folder / "imageless.parquet", good.drop_columns("image"))
    write(folder / "holes.parquet", table([0, None, 2]))
    write(folder / "negative.parquet", table([0, -1, 2]))
    write(folder / "words.parquet", table(["cat", "dog"], kind=pa.string()))
    write(folder / "none_left.parquet", good.slice(0, 0))
    scribble = pa.array([b"no image"] * 3, pa.binary())
    write(folder / "scribble.parquet", good.set_column(0, "image", scribble))
    whole = (folder / "good/train.parquet").read_bytes()
    (folder / "truncated.parquet").write_bytes(whole[: len(whole) // 2])


def _checkpoints(folder: Path) -> None:
    dense = dense_folder(folder / "dense")
    for name in ("weightless", "configless", "truncated", "foreign", "recordless", "renamed"):
        shutil.copytree(dense, folder / name)
    (folder / "weightless/model.safetensors").unlink()
    (folder / "configless/config.json").unlink()
    whole = (dense / "model.safetensors").read_bytes()
    (folder / "truncated/model.safetensors").write_bytes(whole[: len(whole) // 2])
    (folder / "foreign/config.json").write_text('{"model_type": "bert"}')
    (folder / "recordless/pruning.json").write_text('{"sparsity": 0.5}')
    edit_json(folder / "renamed/config.json", architecture="vit_of_ours")
    (folder / "renamed/pruning.json").unlink()


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty working directory in which nothing may start; what Ctrl-C does is restored."""
    monkeypatch.chdir(tmp_path)
    for name in ("MLFLOW_TRACKING_URI", "RAY_ADDRESS"):
        monkeypatch.delenv(name, raising=False)

    def start(*arguments: object, **options: object) -> None:
        raise AssertionError(f"something was started: {arguments}")

    monkeypatch.setattr(ray, "init", start)
    monkeypatch.setattr(connect.ray, "init", start)
    monkeypatch.setattr(tracker, "start_server", start)
    kinds = (signal.SIGINT, signal.SIGTERM)
    before = [signal.getsignal(kind) for kind in kinds]
    yield tmp_path
    for kind, handler in zip(kinds, before, strict=True):
        signal.signal(kind, handler)


def arguments(name: str, bad: Path) -> list[str]:
    return [part.replace("@", str(bad)) if "@/" in part else part for part in shlex.split(CASES[name]["run"])]


def judge(name: str, status: object, error: str, bad: Path, here: Path) -> None:
    """One line that names all it must, status 2, and an untouched working directory."""
    assert status == 2, error
    assert len(error.splitlines()) == 1, error
    assert error.startswith("espalier: ")
    assert "Traceback" not in error
    missing = [text for text in CASES[name]["says"] if text not in error]
    assert not missing, f"{missing} not in: {error}"
    assert list(here.iterdir()) == []
    assert list((bad / "empty").iterdir()) == []
    assert not ray.is_initialized()


@pytest.mark.parametrize("name", CASES)
def test_bad_input__bad_input_is_one_line(
    name: str, bad: Path, here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["espalier", *arguments(name, bad)])
    with pytest.raises(SystemExit) as end:
        app.main()
    judge(name, end.value.code, capsys.readouterr().err, bad, here)


@pytest.mark.parametrize("name", BY_HAND)
def test_bad_input__bad_input_by_hand(name: str, bad: Path, tmp_path: Path) -> None:
    """The installed command in a process of its own, which leaves no process behind."""
    done = subprocess.run(
        [ESPALIER, *arguments(name, bad)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    judge(name, done.returncode, done.stderr, bad, tmp_path)


def test_bad_input__there_are_cases_enough() -> None:
    assert len(CASES) >= 25
