"""The INT8 folder: a quantised model for ONNX Runtime, beside the float checkpoint that it came from.

``model.onnx`` is the model (:mod:`trainers.int8_file`), its preprocessing in the file's metadata;
``config.json`` the parent's (timm's: architecture, classes, preprocessing); ``masks.safetensors`` the masks
of the parent, where it has some; ``quantization.json`` the record: mode, engine, the parent's hash, figures,
its answers to some made-up pictures, versions, checksums. There is no pickle, and there are no float
weights: timm does not load this folder.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterable, Mapping
from importlib.metadata import version
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from pruners.errors import InputError
from pruners.masks import MaskSet
from trainers import models
from trainers.agreement import Agreement
from trainers.checkpoint import (
    CONFIG,
    MASKS,
    QUANTISED,
    RANGES,
    load_checkpoint,
    read_ranges,
    verify,
    versions,
    weights_hash,
)
from trainers.int8_file import check_zeros, write_dynamic, write_static
from trainers.onnx_export import FILE, read_metadata
from trainers.optional import require
from trainers.preprocessing import PREPROCESSING, pattern_images, preprocessing_of, transform_settings
from trainers.quantize import Prepared
from trainers.quantize_settings import Mode

RECORD = QUANTISED
NEEDS = ("torchao", "onnx", "onnxscript", "onnxruntime")
"""Packages, all of the extra ``deploy``."""
PROBES = 4
"""Made-up pictures whose answers, held against torch's, the record keeps."""
_APART: dict[Mode, float] = {"static": 0.05, "qat": 0.05, "dynamic": 0.2}
"""Relative, of the answers: held against torch's own INT8 model; ``dynamic`` against the one in float32, from
which models of 16 channels come to 0.09, those of use to 0.01."""
FORMAT = "espalier-int8-1"
ENGINE = "onnxruntime"
_KEPT = (
    "method",
    "sparsity",
    "allocation",
    "costs",
    "parent",
    "data",
    "git_commit",
    "recipe_digest",
    "sweep",
)


def quantise(
    source: Path,
    folder: Path,
    mode: Mode,
    images: Iterable[Tensor] = (),
    *,
    labels: list[str] | None = None,
    record: Mapping[str, Any] = MappingProxyType({}),
    figures: Callable[[nn.Module], Mapping[str, float]] = lambda model: {},
    key: str = "checkpoint",
) -> dict[str, Any]:
    """Fill ``folder`` with the INT8 form of a checkpoint folder; returns its record.

    Args:
        mode: how; of ``qat`` the training is over, and left its ranges in ``source``.
        images: for ``static``, batches that ranges are taken from.
        labels: names of the classes.
        record: what ``quantization.json`` shall say of where it comes from, over what ``source`` says.
        figures: what is measured of the file as its engine runs it.

    Raises:
        InputError: a source that cannot be used.
        RuntimeError: a pruned weight that is not 0 in the file, or an engine that answers otherwise.
    """
    require("mode", mode, *NEEDS)
    parent = verify(source, str(source), key=key)
    loaded = load_checkpoint(str(source), key=key)
    model = loaded.model.eval()
    pictures = torch.from_numpy(pattern_images(preprocessing_of(model), PROBES))
    expected = _answers(model, pictures)
    if mode == "dynamic":
        write_dynamic(folder / FILE, model, labels)
    else:
        prepared = Prepared(model, models.input_size(model), aware=mode == "qat")
        if mode == "qat":
            prepared.set_ranges(_ranges_of(source, key))
        else:
            prepared.calibrate(images)
        converted = prepared.convert()
        expected = _answers(converted, pictures)  # such pictures may lie outside the ranges, for both alike
        write_static(folder / FILE, converted, model, labels)
    engine = Int8Model(folder / FILE)
    answers = _answers(engine, pictures)
    found = Agreement.of(answers, expected)
    if not found.relative <= _APART[mode]:
        raise RuntimeError(f"{ENGINE} does not answer what torch answers (differences: {found})")
    held = 0 if loaded.masks is None else check_zeros(folder / FILE, loaded.masks)
    kept = {name: parent[name] for name in _KEPT if name in parent}
    content = {
        "method": "dense",
        "sparsity": 0.0,
        **kept,
        **record,
        "mode": mode,
        "float": weights_hash(str(source)),
        "zeros": held,
        "figures": dict(figures(engine)),
        "probe": {"images": PROBES, "logits": answers.tolist(), "agreement": found.as_dict()},
    }
    shutil.copyfile(source / CONFIG, folder / CONFIG)
    return seal(folder, loaded.masks, content)


def seal(folder: Path, masks: MaskSet | None, record: Mapping[str, Any]) -> dict[str, Any]:
    """Add masks and record to a folder that holds the model and its configuration; returns the record."""
    files = [FILE, CONFIG]
    if masks is not None:
        masks.save(folder / MASKS)
        files.append(MASKS)
    for name in files:
        (folder / name).chmod(0o644)  # safetensors gives its files to their owner alone
    content = {
        "format": FORMAT,
        "engine": f"{ENGINE} {version(ENGINE)}",
        **record,
        "bytes": (folder / FILE).stat().st_size,
        "versions": versions() | {name: version(name) for name in ("torchao", "onnx", ENGINE)},
        "files": {name: _sha256(folder / name) for name in files},
    }
    (folder / RECORD).write_text(json.dumps(content, indent=1, sort_keys=True))
    return content


@torch.no_grad()
def _answers(model: nn.Module, pictures: Tensor) -> NDArray[np.float32]:
    found: NDArray[np.float32] = model.eval()(pictures).numpy()
    return found


def _ranges_of(source: Path, key: str) -> dict[str, Tensor]:
    ranges = read_ranges(source)
    if ranges is None:
        raise InputError(key, str(source), f"was not trained for INT8: it has no {RANGES}")
    return ranges


def read_record(folder: Path, place: str, *, key: str) -> dict[str, Any]:
    """The record of an INT8 folder, after checking its files.

    Raises:
        InputError: a file that is missing or changed.
    """
    try:
        record: dict[str, Any] = json.loads((folder / RECORD).read_text())
        sums = dict(record["files"])
        if any(Path(name).name != name for name in sums) or FILE not in sums:
            raise ValueError("files of other folders")
    except (OSError, ValueError, KeyError, TypeError):
        raise InputError(key, place, f"{RECORD} must be a record written by espalier") from None
    for name, expected in sums.items():
        if not (folder / name).is_file():
            raise InputError(key, place, f"{name} is missing; {RECORD} lists it")
        if _sha256(folder / name) != expected:
            raise InputError(key, place, f"{name} is not the file that {RECORD} describes (checksum differs)")
    return record


def load(folder: Path, place: str, *, key: str) -> tuple[Int8Model, dict[str, Any]]:
    """The model as its engine runs it, and timm's preprocessing for it.

    Raises:
        InputError: as :func:`read_record`.
    """
    read_record(folder, place, key=key)
    about = json.loads(read_metadata(folder / FILE)[PREPROCESSING])
    return Int8Model(folder / FILE), transform_settings(about)


def classes(folder: Path) -> int:
    """How many the model tells apart."""
    return int(json.loads(read_metadata(folder / FILE)[PREPROCESSING])["classes"])


def is_int8(folder: Path) -> bool:
    return (folder / RECORD).is_file()


class Int8Model(nn.Module):
    """The file run by ONNX Runtime on the CPU: images (N, 3, H, W) to logits (N, classes)."""

    def __init__(self, path: Path, threads: int | None = None) -> None:
        super().__init__()
        require("quantize", "int8", "onnxruntime")
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads or torch.get_num_threads()
        options.log_severity_level = 3
        self._session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        self._input = self._session.get_inputs()[0].name

    def forward(self, images: Tensor) -> Tensor:
        return torch.from_numpy(self._session.run(None, {self._input: images.contiguous().numpy()})[0])


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
