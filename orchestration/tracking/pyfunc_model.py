"""Files that make a folder of weights an MLflow model as well, without pickle."""

from __future__ import annotations

import io
import json
import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory

from pruners.errors import InputError
from trainers.data.digits import picture
from trainers.sources.classes import CLASSES, names_beside, names_of, read_map
from trainers.sources.columns import Columns

MARK = "MLmodel"
CODE = Path(__file__).with_name("served_model.py")
_NEEDS = ("mlflow", "torch", "torchvision", "timm", "pillow")


@contextmanager
def model_files(classes: Mapping[str, int] | None = None, reader: str = "safetensors") -> Iterator[Path]:
    """A temporary folder with the files that MLflow needs beside ``model.safetensors`` or ``model.onnx``.

    ``MLmodel`` with the signature (image bytes in; class, label, probabilities out), an example, the code
    that answers, and the packages that it needs, as they are installed here.

    Args:
        classes: the label of each class by its name, if they are known.
        reader: the package that reads the model's file.
    """
    import pandas as pd
    from mlflow import pyfunc
    from mlflow.models import Model, ModelSignature
    from mlflow.types import ColSpec, DataType, Schema
    from mlflow.types.schema import Array

    inputs = Schema([ColSpec(DataType.binary, "image")])
    outputs = Schema(
        [
            ColSpec(DataType.long, "class"),
            ColSpec(DataType.string, "label", required=False),
            ColSpec(Array(DataType.double), "probabilities"),
        ]
    )
    with TemporaryDirectory(prefix="espalier-") as target, _quietly():
        folder = Path(target) / "model"
        pyfunc.save_model(
            folder,
            python_model=str(CODE),
            signature=ModelSignature(inputs, outputs),
            input_example=pd.DataFrame({"image": [_example()]}),
            pip_requirements=requirements(reader),
        )
        model = Model.load(folder)
        # relative: the file lies beside MLmodel wherever that is
        model.flavors[pyfunc.FLAVOR_NAME][pyfunc.MODEL_CODE_PATH] = CODE.name
        model.save(folder / MARK)
        if classes is not None:
            (folder / CLASSES).write_text(json.dumps(dict(classes), indent=1), encoding="utf-8")
        yield folder


def classes_of(train: str | None, columns: Columns | None = None) -> dict[str, int] | None:
    """The label of each class by its name, if the images or ``classes.json`` beside them name the classes."""
    names = labels_of(train, columns) or []
    # two classes may share a name (a crane is a bird, and a machine): the model's configuration has both
    return {name: label for label, name in enumerate(names)} if 0 < len(names) == len(set(names)) else None


def labels_of(train: str | None, columns: Columns | None = None) -> list[str] | None:
    """The names of the classes by their labels, if
    :func:`trainers.sources.classes.names_of` knows them.
    """
    if train is None:
        return None
    try:
        return list(names_of(train, key="data.train", columns=columns)) or None
    except InputError:  # the images were checked before the work, and are gone since
        return list(names_beside(train)) or None


def labels_beside(folder: Path) -> list[str] | None:
    """The names of the classes of a registered version, from ``classes.json`` in its folder."""
    return list(read_map(folder / CLASSES, CLASSES)) if (folder / CLASSES).is_file() else None


def requirements(reader: str) -> list[str]:
    """The served model's packages, pinned; without a build's local part (``+cu130``), unknown to indexes."""
    return [f"{name}=={version(name).partition('+')[0]}" for name in (*_NEEDS, reader)]


def _example() -> bytes:
    """A real image, small enough for a JSON file."""
    from sklearn.datasets import load_digits

    sink = io.BytesIO()
    picture(load_digits().images[0]).save(sink, "PNG")
    return sink.getvalue()


@contextmanager
def _quietly() -> Iterator[None]:
    """Run MLflow without its log lines, and without the lock files of the project in the current folder."""
    logger = logging.getLogger("mlflow")
    level, name = logger.level, "MLFLOW_UV_AUTO_DETECT"
    before = os.environ.get(name)
    os.environ[name] = "false"
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before
