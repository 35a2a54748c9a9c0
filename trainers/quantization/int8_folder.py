"""The INT8 folder: a quantized model for ONNX Runtime, made from a float checkpoint folder.

- ``model.onnx``: the model (:mod:`trainers.quantization.int8_onnx`), with its preprocessing as metadata;
- ``config.json``: that of the float checkpoint (timm's: architecture, classes, preprocessing);
- ``masks.safetensors``: the masks of the float checkpoint, if it has some;
- ``quantization.json``: the record (:class:`trainers.checkpoint.records.QuantizationRecord`).

There is no pickle in it, and there are no float weights: timm does not load this folder.

A compressed folder (:func:`pack`) has ``model.onnx.zst`` in place of ``model.onnx``, and no masks, as the
zeros of the weights show them.
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
from trainers.checkpoint.checksums import read_verified, sums
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
from trainers.checkpoint.records import PROVENANCE_KEYS, QuantizationRecord
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
from trainers.storage import as_json

PACKED_MODEL = "model.onnx.zst"
_ZSTD_LEVEL = 19  # high, as it takes seconds, once
NEEDS = ("torchao", "onnx", "onnxscript", "onnxruntime")
"""Packages that quantization needs, all of the extra ``deploy``."""
_TOLERANCE: dict[Mode, float] = {"static": 0.05, "qat": 0.05, "dynamic": 0.2}
"""Largest relative difference of logits: from torch's INT8 model; for ``dynamic`` from the float32 model,
the latter is 0.09 for models of 16 channels and 0.01 for models of practical size."""
_COMPARED = 128  # images whose predicted class is compared with that of the float model
INT8_FORMAT = "espalier-int8-1"
ENGINE = "onnxruntime"


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
    """Quantize a checkpoint folder, and check the result by running it.

    Args:
        source: the float checkpoint folder.
        folder: the folder to fill; it exists and is empty.
        mode: ``dynamic``, ``static`` or ``qat``; for ``qat`` the training is over, and its ranges are in
            ``source``.
        images: batches (N, C, H, W) of normalised training images: ``static`` takes ranges from them, and in
            every mode the classes predicted for the first ones are compared with those of the float model
            (``same_class`` in the record).
        labels: names of the classes.
        record: origin of the model for ``quantization.json``; overrides what the record of ``source`` has.
        figures: measures the model as its engine runs it; its result is kept in the record.
        key: the option or recipe key of ``source``, for error messages.

    Returns:
        The record.

    Raises:
        InputError: a source that cannot be used, or not in this mode; a file most of whose weights are float.
        RuntimeError: a pruned weight that is not 0 in the file, or an engine whose logits differ.
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
        expected = _answers(converted, pictures)  # synthetic images may exceed the ranges, in both alike
        write_static(folder / ONNX_FILE, converted, model, labels)
    engine = Int8Model(folder / ONNX_FILE)
    answers = _answers(engine, pictures)
    agreement = Agreement.of(answers, expected)
    if not agreement.relative <= _TOLERANCE[mode]:
        raise RuntimeError(f"{ENGINE} does not answer what torch answers (differences: {agreement})")
    int8 = int8_values(folder / ONNX_FILE)
    check_share(int8, model)
    zeros = 0 if loaded.masks is None else check_zeros(folder / ONNX_FILE, loaded.masks)
    provenance = {name: parent[name] for name in PROVENANCE_KEYS if name in parent}
    same_class = _same_class(engine, model, batches)
    measured: QuantizationRecord = {
        "mode": mode,
        "float": weights_hash(str(source)),
        "zeros": zeros,
        "int8_share": share_of(int8, model),
        "figures": dict(figures(engine)),
        "probe": {"images": PROBES, "logits": answers.tolist(), "agreement": agreement.as_dict()},
    }
    if same_class is not None:
        measured["same_class"] = same_class
    shutil.copyfile(source / CONFIG, folder / CONFIG)
    content = {"method": "dense", "sparsity": 0.0, **provenance, **record, **measured}
    return write_record(folder, loaded.masks, content)


def write_record(folder: Path, masks: MaskSet | None, record: Mapping[str, Any]) -> dict[str, Any]:
    """Add masks and record to a folder that has ``model.onnx`` and ``config.json``.

    Args:
        folder: the INT8 folder.
        masks: of the float checkpoint, if it has some.
        record: content of the record, without format, engine, size, versions and checksums.

    Returns:
        The complete record.
    """
    files = [ONNX_FILE, CONFIG]
    if masks is not None:
        masks.save(folder / MASKS)
        files.append(MASKS)
    for name in files:
        (folder / name).chmod(0o644)  # files of safetensors can be read by their owner alone
    content = {
        "format": INT8_FORMAT,
        "engine": f"{ENGINE} {version(ENGINE)}",
        **record,
        "bytes": (folder / ONNX_FILE).stat().st_size,
        "versions": versions() | {name: version(name) for name in ("torchao", "onnx", ENGINE)},
        "files": sums(folder, files),
    }
    (folder / QUANTIZATION_RECORD).write_text(as_json(content))
    return content


@torch.no_grad()
def _answers(model: nn.Module, pictures: Tensor) -> NDArray[np.float32]:
    logits: NDArray[np.float32] = model.eval()(pictures).numpy()
    return logits


def _same_class(engine: nn.Module, model: nn.Module, batches: Sequence[Tensor]) -> dict[str, Any] | None:
    """The share of the first images (N, C, H, W) for which INT8 and float32 predict the same class.

    Returns:
        Number of ``images``, and the ``share``; ``None``: there are no images.
    """
    compared = same = 0
    for batch in batches:
        images = batch[: _COMPARED - compared]
        if len(images):
            same += int((_answers(engine, images).argmax(1) == _answers(model, images).argmax(1)).sum())
            compared += len(images)
    return {"images": compared, "share": same / compared} if compared else None


def _ranges_of(source: Path, key: str) -> dict[str, Tensor]:
    ranges = read_ranges(source)
    if ranges is None:
        raise InputError(key, str(source), f"was not trained for INT8: it has no {RANGES}")
    return ranges


def read_record(folder: Path, uri: str, *, key: str) -> dict[str, Any]:
    """Read the record of an INT8 folder, and verify the checksums of its files.

    Args:
        folder: the local folder.
        uri: the folder as the user named it, for error messages.
        key: the option or recipe key that named it, for error messages.

    Raises:
        InputError: a file that is missing or changed.
    """
    names = {ONNX_FILE, PACKED_MODEL}

    def fits(content: dict[str, Any]) -> bool:
        return len(names & set(content["files"])) == 1

    return read_verified(folder, QUANTIZATION_RECORD, uri, key=key, fits=fits)


def pack(source: Path, target: Path, record: Mapping[str, Any]) -> None:
    """Write the compressed form of an INT8 folder.

    Args:
        source: the INT8 folder, compressed or not.
        target: the folder to fill; it exists and is empty.
        record: the record of ``source``, as :func:`read_record` returns it.
    """
    with engine_file(source, record) as path:
        content = pyarrow.Codec("zstd", compression_level=_ZSTD_LEVEL).compress(
            path.read_bytes(), asbytes=True
        )
    (target / PACKED_MODEL).write_bytes(content)
    shutil.copyfile(source / CONFIG, target / CONFIG)
    packed = {**record, "packed_from": record["files"].get(ONNX_FILE) or record["packed_from"]}
    packed["files"] = sums(target, (PACKED_MODEL, CONFIG))
    (target / QUANTIZATION_RECORD).write_text(as_json(packed))


@contextmanager
def engine_file(folder: Path, record: Mapping[str, Any]) -> Iterator[Path]:
    """The ONNX file of an INT8 folder, in a ``with`` block; that of a compressed folder is decompressed.

    Raises:
        InputError: it does not decompress to the number of bytes in the record.
    """
    if ONNX_FILE in record["files"]:
        yield folder / ONNX_FILE
        return
    with tempfile.TemporaryDirectory(prefix="espalier-") as directory:
        try:
            with pyarrow.input_stream(str(folder / PACKED_MODEL), compression="zstd") as stream:
                content = stream.read(record["bytes"] + 1)
        except OSError:
            content = b""
        if len(content) != record["bytes"]:
            raise InputError(
                "model", str(folder), f"{PACKED_MODEL} does not inflate to {record['bytes']} bytes"
            )
        path = Path(directory, ONNX_FILE)
        path.write_bytes(content)
        yield path


def is_int8(folder: Path) -> bool:
    """Return whether a folder is an INT8 folder."""
    return (folder / QUANTIZATION_RECORD).is_file()


@dataclass(frozen=True)
class Runnable:
    """A model of a checkpoint folder or an INT8 folder, ready to run.

    Attributes:
        model: maps images (N, 3, H, W) to logits (N, classes).
        config: timm's preprocessing for it.
        classes: number of classes.
        sparsity: share of zeros among the prunable weights.
        engine: name and version of the engine, if it is not torch.
        labels: names of the classes, if they are known.
        kind: the data type that it computes in.
    """

    model: nn.Module
    config: dict[str, Any]
    classes: int
    sparsity: float
    engine: str | None = None
    labels: Sequence[str] = ()
    kind: str = "float32"


def load_runnable(uri: str, *, key: str) -> Runnable:
    """Load the model of a checkpoint folder or an INT8 folder (any pyarrow URI, or ``hf-hub:NAME``).

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
    return Runnable(model, config, about["classes"], record["sparsity"], engine, labels, kind="int8")


def _of_torch(loaded: Checkpoint) -> Runnable:
    sparsity = 0.0 if loaded.masks is None else loaded.masks.sparsity
    model = loaded.model
    config, labels = factory.data_config(model), factory.label_names(model)
    return Runnable(model, config, factory.classes(model), sparsity, labels=labels)


class Int8Model(nn.Module):
    """An INT8 file, run by ONNX Runtime on the CPU.

    Args:
        path: the ONNX file.
        threads: of the CPU; default: those of torch.
    """

    def __init__(self, path: Path, threads: int | None = None) -> None:
        super().__init__()
        require("quantize", "int8", "onnxruntime")
        self._run = ENGINES[ENGINE].load(path, "int8", Placement(threads or torch.get_num_threads()))

    def forward(self, images: Tensor) -> Tensor:
        """Map images (N, 3, H, W) to logits (N, classes)."""
        return torch.from_numpy(self._run(images.contiguous().numpy()))
