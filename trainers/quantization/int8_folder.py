"""The INT8 folder: a quantised model for ONNX Runtime, beside the float checkpoint that it came from.

``model.onnx`` is the model (:mod:`trainers.quantization.int8_onnx`), its preprocessing in the file's
metadata; ``config.json`` the parent's (timm's: architecture, classes, preprocessing); ``masks.safetensors``
the masks of the parent, where it has some; ``quantization.json`` the record: mode, engine, the parent's hash,
figures, its answers to some made-up pictures, versions, checksums. There is no pickle, and there are no float
weights: timm does not load this folder.

A compressed folder (:func:`pack`) has ``model.onnx.zst`` in place of ``model.onnx``, and no masks: what they
say, the weights do.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import pyarrow
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from pruners.errors import InputError
from pruners.model.masks import MaskSet
from trainers.checkpoint.checksums import as_json, read_verified, sums
from trainers.checkpoint.folder import (
    CONFIG,
    MASKS,
    QUANTIZATION_RECORD,
    RANGES,
    Checkpoint,
    fetched,
    load_checkpoint,
    load_folder,
    read_ranges,
    verify,
    versions,
    weights_hash,
)
from trainers.config.quantization import Mode
from trainers.data.preprocessing import PROBES, pattern_images, preprocessing_of, transform_settings
from trainers.engines.agreement import Agreement
from trainers.engines.registry import ENGINES, Placement
from trainers.export.onnx import ONNX_FILE, int8_values, read_preprocessing
from trainers.models import factory
from trainers.optional_imports import require
from trainers.quantization.checks import check_mode, check_share, share_of
from trainers.quantization.fake_quant import Prepared
from trainers.quantization.int8_onnx import check_zeros, write_dynamic, write_static

PRUNING_RECORD = QUANTIZATION_RECORD
PACKED_MODEL = "model.onnx.zst"
_LEVEL = 19  # of zstd; it takes seconds, once
NEEDS = ("torchao", "onnx", "onnxscript", "onnxruntime")
"""Packages, all of the extra ``deploy``."""
_APART: dict[Mode, float] = {"static": 0.05, "qat": 0.05, "dynamic": 0.2}
"""Relative, of the answers: held against torch's own INT8 model; ``dynamic`` against the one in float32, from
which models of 16 channels come to 0.09, those of use to 0.01."""
_COMPARED = 128  # images on which classes are compared with the float model's
INT8_FORMAT = "espalier-int8-1"
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


def quantize_folder(
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
        images: batches (N, C, H, W) of training images: ``static`` takes ranges from them, and on the first
            ones each mode's classes are compared with the float model's (``same_class`` in the record).
        labels: names of the classes.
        record: what ``quantization.json`` shall say of where it comes from, over what ``source`` says.
        figures: what is measured of the file as its engine runs it.

    Raises:
        InputError: a source that cannot be used, or not in this mode; a file most of whose weights are float.
        RuntimeError: a pruned weight that is not 0 in the file, or an engine that answers otherwise.
    """
    require("mode", mode, *NEEDS)
    parent = verify(source, str(source), key=key)
    loaded = load_checkpoint(str(source), key=key)
    model = loaded.model.eval()
    check_mode(model, mode, loaded.masks or (), "mode")
    batches = list(images)
    pictures = torch.from_numpy(pattern_images(preprocessing_of(model), PROBES))
    expected = _answers(model, pictures)
    if mode == "dynamic":
        write_dynamic(folder / ONNX_FILE, model, labels)
    else:
        prepared = Prepared(model, factory.input_size(model), aware=mode == "qat")
        if mode == "qat":
            prepared.set_ranges(_ranges_of(source, key))
        else:
            prepared.calibrate(batches)
        converted = prepared.convert()
        expected = _answers(converted, pictures)  # such pictures may lie outside the ranges, for both alike
        write_static(folder / ONNX_FILE, converted, model, labels)
    engine = Int8Model(folder / ONNX_FILE)
    answers = _answers(engine, pictures)
    found = Agreement.of(answers, expected)
    if not found.relative <= _APART[mode]:
        raise RuntimeError(f"{ENGINE} does not answer what torch answers (differences: {found})")
    int8 = int8_values(folder / ONNX_FILE)
    check_share(int8, model)
    held = 0 if loaded.masks is None else check_zeros(folder / ONNX_FILE, loaded.masks)
    kept = {name: parent[name] for name in _KEPT if name in parent}
    content = {
        "method": "dense",
        "sparsity": 0.0,
        **kept,
        **record,
        "mode": mode,
        "float": weights_hash(str(source)),
        "zeros": held,
        "int8_share": share_of(int8, model),
        **_same_class(engine, model, batches),
        "figures": dict(figures(engine)),
        "probe": {"images": PROBES, "logits": answers.tolist(), "agreement": found.as_dict()},
    }
    shutil.copyfile(source / CONFIG, folder / CONFIG)
    return write_record(folder, loaded.masks, content)


def write_record(folder: Path, masks: MaskSet | None, record: Mapping[str, Any]) -> dict[str, Any]:
    """Add masks and record to a folder that holds the model and its configuration; returns the record."""
    files = [ONNX_FILE, CONFIG]
    if masks is not None:
        masks.save(folder / MASKS)
        files.append(MASKS)
    for name in files:
        (folder / name).chmod(0o644)  # safetensors gives its files to their owner alone
    content = {
        "format": INT8_FORMAT,
        "engine": f"{ENGINE} {version(ENGINE)}",
        **record,
        "bytes": (folder / ONNX_FILE).stat().st_size,
        "versions": versions() | {name: version(name) for name in ("torchao", "onnx", ENGINE)},
        "files": sums(folder, files),
    }
    (folder / PRUNING_RECORD).write_text(as_json(content))
    return content


@torch.no_grad()
def _answers(model: nn.Module, pictures: Tensor) -> NDArray[np.float32]:
    found: NDArray[np.float32] = model.eval()(pictures).numpy()
    return found


def _same_class(engine: nn.Module, model: nn.Module, batches: Sequence[Tensor]) -> dict[str, Any]:
    """On how many of the first images (N, C, H, W) INT8 gives the class that float32 gives."""
    compared = same = 0
    for batch in batches:
        some = batch[: _COMPARED - compared]
        if len(some):
            same += int((_answers(engine, some).argmax(1) == _answers(model, some).argmax(1)).sum())
            compared += len(some)
    return {"same_class": {"images": compared, "share": same / compared}} if compared else {}


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
    names = {ONNX_FILE, PACKED_MODEL}
    return read_verified(
        folder, PRUNING_RECORD, place, key=key, fits=lambda content: len(names & set(content["files"])) == 1
    )


def pack(source: Path, target: Path, record: Mapping[str, Any]) -> None:
    """Fill ``target`` with the compressed form of an INT8 folder; ``record`` is its checked one."""
    with engine_file(source, record) as path:
        content = pyarrow.Codec("zstd", compression_level=_LEVEL).compress(path.read_bytes(), asbytes=True)
    (target / PACKED_MODEL).write_bytes(content)
    shutil.copyfile(source / CONFIG, target / CONFIG)
    about = {**record, "packed_from": record["files"].get(ONNX_FILE) or record["packed_from"]}
    about["files"] = sums(target, (PACKED_MODEL, CONFIG))
    (target / PRUNING_RECORD).write_text(as_json(about))


@contextmanager
def engine_file(folder: Path, record: Mapping[str, Any]) -> Iterator[Path]:
    """What the engine runs, for as long as it is needed: of a compressed folder, inflated.

    Raises:
        InputError: it does not inflate to as many bytes as the record says.
    """
    if ONNX_FILE in record["files"]:
        yield folder / ONNX_FILE
        return
    with tempfile.TemporaryDirectory(prefix="espalier-") as place:
        try:
            with pyarrow.input_stream(str(folder / PACKED_MODEL), compression="zstd") as stream:
                content = stream.read(record["bytes"] + 1)
        except OSError:
            content = b""
        if len(content) != record["bytes"]:
            raise InputError(
                "model", str(folder), f"{PACKED_MODEL} does not inflate to {record['bytes']} bytes"
            )
        path = Path(place, ONNX_FILE)
        path.write_bytes(content)
        yield path


def is_int8(folder: Path) -> bool:
    """Whether a folder is an INT8 one."""
    return (folder / PRUNING_RECORD).is_file()


@dataclass(frozen=True)
class Runnable:
    """A model of a folder of either kind, as it is run.

    Attributes:
        config: timm's preprocessing for it.
        sparsity: share of zeros among the prunable weights.
        engine: what runs it, if not torch.
        labels: names of the classes, where they are known.
    """

    model: nn.Module
    config: dict[str, Any]
    classes: int
    sparsity: float
    engine: str | None = None
    labels: Sequence[str] = ()


def load_runnable(uri: str, *, key: str) -> Runnable:
    """The model of a checkpoint folder or of an INT8 one (any pyarrow URI, or ``hf-hub:NAME``).

    Raises:
        InputError: a file that is missing, changed, or cannot be loaded.
    """
    if uri.startswith("hf-hub:"):
        return _of_torch(load_checkpoint(uri, key=key))
    with fetched(uri, key=key) as folder:
        if not is_int8(folder):
            return _of_torch(load_folder(folder, uri, key=key))
        record = read_record(folder, uri, key=key)
        with engine_file(folder, record) as path:
            about, model = read_preprocessing(path), Int8Model(path)
    engine, labels = record["engine"], about.get("labels", ())
    config = transform_settings(about)
    return Runnable(model, config, about["classes"], record["sparsity"], engine, labels)


def _of_torch(loaded: Checkpoint) -> Runnable:
    sparsity = 0.0 if loaded.masks is None else loaded.masks.sparsity
    model = loaded.model
    config, labels = factory.data_config(model), factory.label_names(model)
    return Runnable(model, config, factory.classes(model), sparsity, labels=labels)


class Int8Model(nn.Module):
    """The file run by ONNX Runtime on the CPU: images (N, 3, H, W) to logits (N, classes)."""

    def __init__(self, path: Path, threads: int | None = None) -> None:
        super().__init__()
        require("quantize", "int8", "onnxruntime")
        self._run = ENGINES[ENGINE].load(path, "int8", Placement(threads or torch.get_num_threads()))

    def forward(self, images: Tensor) -> Tensor:
        return torch.from_numpy(self._run(images.contiguous().numpy()))
