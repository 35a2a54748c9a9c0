"""The checkpoint folder, one format from dense to pruned.

``config.json`` and ``model.safetensors`` are timm's hub format: plain timm loads the folder with
``timm.create_model('local-dir:PATH', pretrained=True)``. Beside them lie ``masks.safetensors`` (one bit for
each prunable weight) and ``pruning.json`` (:class:`trainers.checkpoint.records.PruningRecord`). There is no
pickle.

A compressed folder has weights and masks in one file of another name (:mod:`trainers.checkpoint.packed`), so
that plain timm does not load it by mistake. :func:`load_checkpoint` reads both kinds.
"""

from __future__ import annotations

import copy
import json
import platform
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from pyarrow import fs
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from pruners.errors import InputError, first_line
from pruners.model.layers import find_layers
from pruners.model.masks import MaskSet
from trainers import storage
from trainers.checkpoint.checksums import read_verified, sha256, sums
from trainers.checkpoint.finite import check_finite, describe, not_finite
from trainers.checkpoint.packed import read_packed, write_packed
from trainers.config.base import is_weights_file
from trainers.data.node_cache import node_copy
from trainers.models.factory import load_hub, load_timm_folder, missing_config
from trainers.models.private_apis import save_for_hf
from trainers.models.transformers_names import transformers_config
from trainers.models.weights_file import load_weights
from trainers.optional_imports import installed
from trainers.storage import as_json, info, local_copy

WEIGHTS, CONFIG, MASKS = "model.safetensors", "config.json", "masks.safetensors"
PACKED_WEIGHTS = "model.safetensors.packed"
PRUNING_RECORD, QUANTIZATION_RECORD = storage.RECORDS
"""The records of a checkpoint folder, and of an INT8 folder (:mod:`trainers.quantization.int8_folder`), whose
weights timm cannot load."""
RANGES = "ranges.safetensors"
"""Ranges of weights and activations of a model trained for INT8 (:mod:`trainers.quantization.fake_quant`)."""
TRAINER_FILES = ("trainer.safetensors", "trainer.json")
"""The state of training, with which a run resumes (:mod:`trainers.checkpoint.trainer_state`)."""
CHECKPOINT_FORMAT = "espalier-checkpoint-1"


@dataclass(frozen=True)
class Checkpoint:
    """A loaded checkpoint.

    Attributes:
        model: with its weights.
        masks: of the pruned layers; ``None``: the model is dense.
        record: content of ``pruning.json``; empty for a folder that espalier did not write.
        arguments: keyword arguments with which timm builds the model.
    """

    model: nn.Module
    masks: MaskSet | None
    record: Mapping[str, Any] = field(default_factory=dict)
    arguments: Mapping[str, Any] = field(default_factory=dict)


def save_checkpoint(
    folder: Path,
    model: nn.Module,
    *,
    model_args: Mapping[str, Any],
    masks: MaskSet | None,
    record: Mapping[str, Any],
    ranges: Mapping[str, Tensor] | None = None,
) -> None:
    """Write a checkpoint folder.

    >>> report = pruners.prune(model, "dimap", 0.75)
    >>> record = {"method": report.method, "sparsity": report.sparsity}
    >>> save_checkpoint(Path("pruned"), model, model_args=arguments, masks=report.masks, record=record)
    >>> sorted(path.name for path in Path("pruned").iterdir())
    ['config.json', 'masks.safetensors', 'model.safetensors', 'pruning.json']

    Args:
        folder: made if need be.
        model: a timm model.
        model_args: the keyword arguments with which timm builds this architecture.
        masks: of the pruned layers; ``None``: the model is dense.
        record: content of ``pruning.json``, without format, versions and checksums.
        ranges: of a model that was trained for INT8, for :data:`RANGES`.

    Raises:
        FloatingPointError: a weight or range that is not finite; nothing is written.
    """
    check_finite({**model.state_dict(), **(ranges or {})}, "the model cannot be saved")
    folder.mkdir(parents=True, exist_ok=True)
    if not all(tensor.is_contiguous() for tensor in model.state_dict().values()):  # channels last
        model = copy.deepcopy(model).to(memory_format=torch.contiguous_format)
    save_for_hf(
        model,
        str(folder),
        model_config={"pretrained_cfg": missing_config(model)},
        model_args=dict(model_args),
        safe_serialization=True,
    )
    files = [WEIGHTS, CONFIG]
    (folder / MASKS).unlink(missing_ok=True)
    if masks is not None:
        masks.save(folder / MASKS)
        files.append(MASKS)
    (folder / RANGES).unlink(missing_ok=True)
    if ranges is not None:
        save_file(dict(ranges), folder / RANGES)
        files.append(RANGES)
    for name in files:
        (folder / name).chmod(0o644)  # files of safetensors can be read by their owner alone
    content = {
        "format": CHECKPOINT_FORMAT,
        **record,
        "versions": versions(),
        "files": sums(folder, files),
    }
    (folder / PRUNING_RECORD).write_text(as_json(content))


def load_checkpoint(
    uri: str,
    *,
    key: str = "checkpoint",
    layers: Mapping[str, Any] | None = None,
    shared: bool = False,
    **arguments: Any,
) -> Checkpoint:
    """Load a checkpoint folder, compressed or not, a file of weights, or a model of the hub.

    Checksums are verified first. For a timm folder that espalier did not write, masks are taken from the
    zeros of the weights.

    >>> save_checkpoint(Path("dense"), model, model_args=arguments, masks=None, record={"method": "dense"})
    >>> checkpoint = load_checkpoint("dense")
    >>> checkpoint.record["method"], checkpoint.masks
    ('dense', None)

    Args:
        uri: a path, any pyarrow URI, or ``hf-hub:NAME``.
        key: the option or recipe key that named it, for error messages.
        layers: patterns of the prunable layers, for masks from zeros; default: the known ones of the
            architecture.
        shared: other processes of this machine read it too: a remote folder is copied once for all.
        arguments: for timm's model, over those of the folder (``drop_path_rate``).

    Returns:
        The model on the CPU, with masks and record.

    Raises:
        InputError: a file that is missing, truncated, or not what its record says.
    """
    if uri.startswith("hf-hub:"):
        return Checkpoint(load_hub(uri, **arguments), None)
    if is_weights_file(uri):
        return _with_zeros(load_weights(uri, arguments=arguments, key=key)[0], {}, layers)
    with fetched(uri, key=key, shared=shared) as folder:
        return load_folder(folder, uri, key=key, layers=layers, **arguments)


def load_folder(
    folder: Path, uri: str, *, key: str, layers: Mapping[str, Any] | None = None, **arguments: Any
) -> Checkpoint:
    """Load a local checkpoint folder, as :func:`load_checkpoint` does.

    Args:
        folder: the local folder.
        uri: the folder as the user named it, for error messages.
        key: the option or recipe key that named it, for error messages.
        layers: patterns of the prunable layers, for masks from zeros.
        arguments: for timm's model, over those of the folder.

    Returns:
        The model with masks and record.

    Raises:
        InputError: as :func:`verify`, or weights or masks that do not fit, or weights that are not finite.
    """
    record = verify(folder, uri, key=key)
    weights, masks = None, MaskSet.load(folder / MASKS) if (folder / MASKS).exists() else None
    if is_packed(folder):
        weights, masks = _packed(folder, uri, key)
    try:
        model = load_timm_folder(folder, weights, **arguments)
    except (RuntimeError, KeyError, ValueError, TypeError) as error:
        raise InputError(key, uri, f"timm cannot load it ({first_line(error)})") from None
    broken = not_finite(model.state_dict())
    if broken:
        raise InputError(key, uri, f"holds weights that no model can have: {describe(broken)}")
    if masks is not None:
        shapes = {name: weight.shape for name, weight in model.named_parameters()}
        for name, mask in masks.items():
            if shapes.get(name) != mask.shape:
                file = PACKED_WEIGHTS if is_packed(folder) else MASKS
                raise InputError(key, uri, f"{file} does not fit the model ({name})")
        return Checkpoint(model, masks, record, model_args(folder))
    return replace(_with_zeros(model, record, layers), arguments=model_args(folder))


def _with_zeros(model: nn.Module, record: Mapping[str, Any], layers: Mapping[str, Any] | None) -> Checkpoint:
    """A checkpoint of a model without masks, which are made of its zeros."""
    masks = MaskSet.from_zeros(model, find_layers(model, layers))
    return Checkpoint(model, masks if masks.sparsity > 0 else None, record)


def save_imported(
    folder: Path, model: nn.Module, uri: str, chosen: str, *, model_args: Mapping[str, Any]
) -> None:
    """Write the checkpoint folder of a model that was loaded from a file of weights.

    Args:
        folder: made if need be.
        model: the model.
        uri: the file of weights; its name is recorded.
        chosen: the set of weights that was taken from the file; empty where it has one.
        model_args: the keyword arguments with which timm builds this architecture.
    """
    name = PurePosixPath(uri).name
    source = f"{name}: {chosen}" if chosen else name
    save_checkpoint(folder, model, model_args=model_args, masks=None, record={"source": source})


@contextmanager
def open_verified(uri: str, *, key: str = "checkpoint") -> Iterator[tuple[Path, dict[str, Any]]]:
    """A checkpoint folder as a local path, verified, and its record, in a ``with`` block.

    Raises:
        InputError: as :func:`fetched` and :func:`verify`.
    """
    with fetched(uri, key=key) as folder:
        yield folder, verify(folder, uri, key=key)


@contextmanager
def fetched(uri: str, *, key: str, shared: bool = False) -> Iterator[Path]:
    """A checkpoint folder as a local path, unverified, in a ``with`` block.

    A file of weights that names its architecture is converted to a folder.

    Args:
        uri: a path or any pyarrow URI.
        key: the option or recipe key that named it, for error messages.
        shared: keep the copy for the other processes of this machine (:mod:`trainers.data.node_cache`).

    Yields:
        The local folder.

    Raises:
        InputError: it does not exist, or cannot be reached.
    """
    if is_weights_file(uri):
        with tempfile.TemporaryDirectory(prefix="espalier-") as made:
            model, chosen = load_weights(uri, key=key)
            save_imported(Path(made), model, uri, chosen, model_args={})
            yield Path(made)
        return
    check_exists(uri, key=key)
    if shared:
        yield node_copy(uri)
        return
    with local_copy(uri) as folder:
        yield folder


def check_exists(uri: str, *, key: str) -> None:
    """Check that a checkpoint folder, or a file of weights, exists.

    Raises:
        InputError: it does not exist, or cannot be reached.
    """
    if is_weights_file(uri) and info(uri, key=key).type == fs.FileType.File:
        return
    if info(uri, key=key).type != fs.FileType.Directory:
        raise InputError(key, uri, f"no such folder; must hold {CONFIG} and {WEIGHTS}")


def pack_folder(source: Path, target: Path, record: Mapping[str, Any]) -> list[str]:
    """Write the compressed form of a checkpoint folder.

    Args:
        source: a folder that :func:`verify` has accepted.
        target: the folder to fill; it exists and is empty.
        record: the record of ``source``.

    Returns:
        Names of the tensors that are packed.

    Raises:
        InputError: masks, or packed weights, that cannot be read.
    """
    kept = {key: value for key, value in record.items() if key != "architecture"}
    if is_packed(source):
        weights, masks = _packed(source, str(source), "checkpoint")
    else:
        weights = load_file(source / WEIGHTS)
        masks = MaskSet.load(source / MASKS) if (source / MASKS).exists() else None
        kept["packed_from"] = sha256(source / WEIGHTS)
    names = write_packed(target / PACKED_WEIGHTS, weights, masks)
    files = [PACKED_WEIGHTS, CONFIG] + ([RANGES] if (source / RANGES).exists() else [])
    for name in files[1:]:
        shutil.copyfile(source / name, target / name)
    for name in files:
        (target / name).chmod(0o644)
    content = {"format": CHECKPOINT_FORMAT, "versions": versions(), **kept, "files": sums(target, files)}
    (target / PRUNING_RECORD).write_text(as_json(content))
    return names


def is_packed(folder: Path) -> bool:
    """Return whether a folder is compressed."""
    return (folder / PACKED_WEIGHTS).is_file() and not (folder / WEIGHTS).exists()


def _packed(folder: Path, uri: str, key: str) -> tuple[dict[str, Tensor], MaskSet | None]:
    try:
        return read_packed(folder / PACKED_WEIGHTS)
    except ValueError as error:
        raise InputError(key, uri, f"{PACKED_WEIGHTS} holds no packed weights ({error})") from None


def verify(folder: Path, uri: str, *, key: str = "checkpoint") -> dict[str, Any]:
    """Verify a local checkpoint folder without loading its weights.

    Args:
        folder: the local folder.
        uri: the folder as the user named it, for error messages.
        key: the option or recipe key that named it, for error messages.

    Returns:
        Its record with the ``architecture``; empty for a folder that espalier did not write.

    Raises:
        InputError: a file is missing, truncated, or not timm's; names it.
    """
    if not folder.is_dir():
        raise InputError(key, uri, f"no such folder; must hold {CONFIG} and {WEIGHTS}")
    if (folder / QUANTIZATION_RECORD).is_file():
        raise InputError(key, uri, "is quantised already: an INT8 model, which ONNX Runtime alone runs")
    weights = PACKED_WEIGHTS if is_packed(folder) else WEIGHTS
    for name in (CONFIG, weights):
        if not (folder / name).is_file():
            raise InputError(key, uri, f"{name} is missing; must be a timm checkpoint folder")
        if name == CONFIG and (foreign := transformers_config(folder / CONFIG)) is not None:
            raise InputError(key, uri, f"{CONFIG} must be timm's; this is {foreign}")
    try:
        architecture = json.loads((folder / CONFIG).read_text())["architecture"]
    except (ValueError, KeyError, TypeError):
        raise InputError(key, uri, f"{CONFIG} must be timm's, with an architecture") from None
    try:
        with safe_open(folder / weights, framework="np") as file:
            file.keys()
    except (SafetensorError, OSError) as error:
        raise InputError(key, uri, f"{weights} is truncated or no safetensors file ({error})") from None
    if not (folder / PRUNING_RECORD).exists():
        return {}
    return {"architecture": architecture, **read_verified(folder, PRUNING_RECORD, uri, key=key)}


def read_ranges(folder: Path) -> dict[str, Tensor] | None:
    """The ranges of a model that was trained for INT8; ``None`` for any other."""
    return load_file(folder / RANGES) if (folder / RANGES).exists() else None


def model_args(folder: Path) -> dict[str, Any]:
    """The keyword arguments with which timm builds the folder's architecture."""
    arguments: dict[str, Any] = json.loads((folder / CONFIG).read_text()).get("model_args") or {}
    return arguments


def size_on_disk(folder: Path) -> int:
    """Size of the weights and masks in bytes."""
    files = (WEIGHTS, MASKS, PACKED_WEIGHTS)
    return sum((folder / name).stat().st_size for name in files if (folder / name).exists())


def weights_hash(uri: str) -> str:
    """SHA-256 of a model's weights, which identifies it in records.

    It is that of ``model.safetensors``, or of a file of weights; for a compressed folder that of the
    uncompressed weights, for an INT8 folder that of ``model.onnx``.
    """
    if is_weights_file(uri):
        return storage.sha256(uri)
    if storage.exists(f"{uri}/{WEIGHTS}"):
        return storage.sha256(f"{uri}/{WEIGHTS}")
    if storage.exists(f"{uri}/{QUANTIZATION_RECORD}"):
        record = storage.read_json(f"{uri}/{QUANTIZATION_RECORD}")
        return str(record.get("packed_from") or record["files"]["model.onnx"])
    record = storage.read_json(f"{uri}/{PRUNING_RECORD}") if storage.exists(f"{uri}/{PRUNING_RECORD}") else {}
    return str(record.get("packed_from") or storage.sha256(f"{uri}/{PACKED_WEIGHTS}"))


def versions() -> dict[str, str]:
    """Versions of Python and of the packages on which a result depends."""
    packages = installed("espalier", "torch", "timm", "ray", "optuna", "mlflow")
    return {"python": platform.python_version(), **packages}
