"""A checkpoint or an INT8 model as MLflow serves it: image bytes in; class, label and probabilities out.

This file is logged beside the checkpoint's own files ("models from code"), without pickle, and needs neither
espalier nor Ray. If espalier is installed, a sparse checkpoint is run by the sparse engine if that is faster;
the environment variable :data:`ENGINE` can choose the engine instead.
"""

from __future__ import annotations

import io
import json
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pandas as pd
import timm
import torch
from mlflow.models import set_model
from mlflow.pyfunc.model import PythonModel
from PIL import Image, ImageOps, UnidentifiedImageError
from timm.data import create_transform, resolve_model_data_config
from torch import Tensor

_TOGETHER = 64  # images of one forward pass
_INT8 = "model.onnx"
ENGINE = "ESPALIER_ENGINE"
"""``auto`` (the faster one), ``torch`` or ``sparse``."""
_ENGINES = ("auto", "torch", "sparse")
_LEAST_ZEROS = 0.4  # share of the weights of linear layers; with fewer the sparse engine gains nothing
_RELATIVE = 1e-3  # difference of the answers of two engines
_ROUNDS = 5
_PREPROCESSING = ("input_size", "mean", "std", "interpolation", "crop_pct", "crop_mode")
Run = Callable[[Tensor], Tensor]
"""Prepared images (N, 3, H, W) to logits (N, classes)."""


class ServedModel(PythonModel):
    """The model of the folder that this file lies in: timm's, or one in INT8 for ONNX Runtime."""

    def load_context(self, context: Any) -> None:
        """Load the weights; labels are those of the data's classes, or of the model itself."""
        folder = Path(__file__).parent
        load = _quantized if (folder / _INT8).is_file() else _checkpoint
        self._run, config, labels = load(folder)
        self._transform = create_transform(**config, is_training=False)
        classes = folder / "classes.json"
        names = json.loads(classes.read_text(encoding="utf-8")) if classes.is_file() else {}
        self._labels = {label: name for name, label in names.items()} or dict(enumerate(labels))

    @torch.inference_mode()
    def predict(self, context: Any, model_input: pd.DataFrame, params: Any = None) -> pd.DataFrame:
        """Class, label and probabilities of each image.

        Args:
            context: MLflow's; not used.
            model_input: a row for each image, its bytes in the column ``image``.
            params: MLflow's; not used.

        Returns:
            A row for each image: ``class``, ``label``, ``probabilities``.
        """
        rows = []
        for begin in range(0, len(model_input), _TOGETHER):
            cells = model_input["image"].iloc[begin : begin + _TOGETHER]
            pixels = torch.stack([self._read(cell, begin + i) for i, cell in enumerate(cells)])
            for shares in self._run(pixels).softmax(1).tolist():
                best = max(range(len(shares)), key=shares.__getitem__)
                rows.append({"class": best, "label": self._labels.get(best), "probabilities": shares})
        return pd.DataFrame(rows, columns=["class", "label", "probabilities"])

    def _read(self, cell: bytes, row: int) -> Tensor:
        try:
            pixels: Tensor = self._transform(decode(cell))
        except (
            OSError,
            SyntaxError,
            ValueError,
            EOFError,
            IndexError,
            Image.DecompressionBombError,
        ) as error:
            raise ValueError(f"image {row} cannot be decoded ({error})") from None
        return pixels


def _checkpoint(folder: Path) -> tuple[Run, Mapping[str, Any], list[str]]:
    """Load a checkpoint folder: the function that runs it, its preprocessing, the names of its classes."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval().to(device)
    labels = model.pretrained_cfg.get("label_names") or []
    if isinstance(labels, Mapping):  # timm takes {index: name} too
        labels = [labels[key] for key in sorted(labels, key=int)]
    config = resolve_model_data_config(model)

    def run(pixels: Tensor) -> Tensor:
        answers: Tensor = model(pixels.to(device))
        return answers

    return run if device == "cuda" else _faster(model, run, config["input_size"]), config, list(labels)


def _faster(model: torch.nn.Module, by_torch: Run, size: tuple[int, int, int]) -> Run:
    """Choose what is faster for one image on this machine: torch, or the sparse engine if that can run it.

    Args:
        model: a timm model, on the CPU.
        by_torch: runs it by torch.
        size: channels, height and width of an image.

    Returns:
        The function from prepared images to logits.

    Raises:
        ValueError: :data:`ENGINE` asks for an unknown engine, or for one that cannot run the model.
    """
    asked = os.environ.get(ENGINE, "auto")
    if asked not in _ENGINES:
        raise ValueError(f"{ENGINE} = {asked!r}: must be one of {', '.join(_ENGINES)}")
    if asked == "torch" or (asked == "auto" and _zeros(model) < _LEAST_ZEROS):
        return by_torch
    try:
        from trainers.sparse import load
        from trainers.sparse.packing import pack

        with TemporaryDirectory(prefix="espalier-") as folder:
            pack(model, folder)
            engine = load(folder, threads=torch.get_num_threads())
    except (ImportError, ValueError) as error:  # not installed, or a model that it has no kernels for
        if asked == "sparse":
            raise ValueError(f"{ENGINE} = 'sparse': {error}") from None
        return by_torch

    def by_engine(pixels: Tensor) -> Tensor:
        return torch.from_numpy(engine(np.ascontiguousarray(pixels.numpy())))

    image = torch.randn(1, *size, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected, answer = by_torch(image), by_engine(image)
        if not torch.linalg.vector_norm(answer - expected) <= _RELATIVE * torch.linalg.vector_norm(expected):
            raise ValueError("the sparse engine does not answer what torch answers")
        if asked == "sparse" or _seconds(by_engine, image) < _seconds(by_torch, image):
            return by_engine
    return by_torch


def _zeros(model: torch.nn.Module) -> float:
    """The share of zeros among the weights of linear layers."""
    weights = [module.weight for module in model.modules() if isinstance(module, torch.nn.Linear)]
    return sum(int((weight == 0).sum()) for weight in weights) / max(sum(map(torch.numel, weights)), 1)


def _seconds(run: Run, image: Tensor) -> float:
    """The median time of a few calls in seconds, after a first one that does not count."""
    run(image)
    times = []
    for _ in range(_ROUNDS):
        began = time.perf_counter()
        run(image)
        times.append(time.perf_counter() - began)
    return median(times)


def _quantized(folder: Path) -> tuple[Run, Mapping[str, Any], list[str]]:
    """Load an INT8 model, whose file holds preprocessing and labels: as :func:`_checkpoint`."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(folder / _INT8), providers=["CPUExecutionProvider"])
    about = json.loads(session.get_modelmeta().custom_metadata_map["preprocessing"])
    name = session.get_inputs()[0].name

    def run(pixels: Tensor) -> Tensor:
        return torch.from_numpy(np.asarray(session.run(None, {name: pixels.numpy()})[0]))

    config = {key: about[key] for key in _PREPROCESSING}
    return run, {**config, "input_size": tuple(config["input_size"])}, about.get("labels", [])


def decode(content: bytes) -> Image.Image:
    """Decode an image to upright RGB of 8 bits, as for training (``trainers.sources.parquet.decode``)."""
    try:
        image: Image.Image = Image.open(io.BytesIO(content))
    except UnidentifiedImageError:  # Pillow would name a place in memory
        raise ValueError("no image of a known format") from None
    if image.format in ("JPEG", "MPO"):
        ImageOps.exif_transpose(image, in_place=True)
    if image.mode.startswith("I"):  # 16 bits a pixel, of which Pillow would keep the lower eight
        wide = np.asarray(image).astype(np.float64)
        scale = 257.0 if image.mode.startswith("I;16") or wide.max() > 255 else 1.0
        image = Image.fromarray((wide / scale).round().clip(0, 255).astype(np.uint8))
    elif image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return image.convert("RGB")


set_model(ServedModel())
