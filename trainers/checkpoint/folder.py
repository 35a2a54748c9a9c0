"""The checkpoint folder, one format from dense to pruned.

``config.json`` and ``model.safetensors`` are timm's hub format: plain timm loads the folder with
``timm.create_model('local-dir:PATH', pretrained=True)``. Beside them lie ``masks.safetensors`` (one bit a
prunable weight) and ``pruning.json`` (method, allocation, figures, versions, checksums). No pickle.

A compressed folder holds weights and masks in one file of another name (:mod:`trainers.checkpoint.packed`),
in which plain timm does not look for weights: it would take none of them. :func:`load_checkpoint` reads both
kinds.
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

import timm
import torch
from pyarrow import fs
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from timm.models import _hub
from torch import Tensor, nn

from pruners.errors import InputError
from pruners.model.layers import find_layers
from pruners.model.masks import MaskSet
from trainers import storage
from trainers.checkpoint.checksums import as_json, read_verified, sha256, sums
from trainers.checkpoint.finite import check_finite, describe, not_finite
from trainers.checkpoint.packed import read_packed, write_packed
from trainers.config.base import is_weights_file
from trainers.data.node_cache import node_copy
from trainers.models.factory import load_hub, load_timm_folder
from trainers.models.transformers_names import transformers_model
from trainers.models.weights_file import load_weights
from trainers.optional_imports import installed
from trainers.storage import info, local_copy

WEIGHTS, CONFIG, MASKS = "model.safetensors", "config.json", "masks.safetensors"
PACKED_WEIGHTS = "model.safetensors.packed"
PRUNING_RECORD, QUANTIZATION_RECORD = storage.RECORDS
"""What marks a folder of ours, and one of :mod:`trainers.quantization.int8_folder`, which has no weights
that timm could load."""
RANGES = "ranges.safetensors"
"""Of a model trained for INT8: what its int8 values stand for (:mod:`trainers.quantization.fake_quant`)."""
TRAINER_FILES = ("trainer.safetensors", "trainer.json")
"""What only the run that wrote it could go on from (:mod:`trainers.checkpoint.trainer_state`)."""
CHECKPOINT_FORMAT = "espalier-checkpoint-1"


@dataclass(frozen=True)
class Checkpoint:
    """A model, the masks of what is pruned in it (none: dense), its record, the arguments that build it."""

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
    """Write the folder (made if need be).

    Args:
        model_args: the keyword arguments that build this architecture.
        record: what ``pruning.json`` shall say besides versions and checksums.
        ranges: of a model that was trained for INT8; they go into :data:`RANGES`.

    Raises:
        FloatingPointError: a weight or range that is not finite; nothing is written.
    """
    check_finite({**model.state_dict(), **(ranges or {})}, "the model cannot be saved")
    folder.mkdir(parents=True, exist_ok=True)
    if not all(tensor.is_contiguous() for tensor in model.state_dict().values()):  # channels last
        model = copy.deepcopy(model).to(memory_format=torch.contiguous_format)
    _hub.save_for_hf(
        model,
        str(folder),
        model_config={"pretrained_cfg": _named_parts(model)},
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
        (folder / name).chmod(0o644)  # safetensors gives its files to their owner alone
    content = {
        "format": CHECKPOINT_FORMAT,
        **record,
        "versions": versions(),
        "files": sums(folder, files),
    }
    (folder / PRUNING_RECORD).write_text(as_json(content))


def _named_parts(model: nn.Module) -> dict[str, Any]:
    """The classifier's name where the model came without it: plain timm needs it to put a new one there."""
    config: Any = model.pretrained_cfg
    known = timm.get_pretrained_cfg(config["architecture"])
    if config.get("classifier") is not None or known is None or known.classifier is None:
        return {}
    return {"classifier": known.classifier}


def load_checkpoint(
    uri: str,
    *,
    key: str = "checkpoint",
    layers: Mapping[str, Any] | None = None,
    shared: bool = False,
    **arguments: Any,
) -> Checkpoint:
    """Load a folder (any pyarrow URI), compressed or not, or ``hf-hub:NAME``, after checking its files.

    A timm folder that espalier did not write is welcome; masks are then read from the zeros of the weights.

    Args:
        shared: other processes of this machine read it too: what lies far away is copied once for all.
        arguments: for timm's model, over those of the folder (``drop_path_rate``).

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
    """As :func:`load_checkpoint`, of a folder of this machine that its user knows as ``uri``.

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
        raise InputError(key, uri, f"timm cannot load it ({str(error).splitlines()[0]})") from None
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
    """A model that came without masks: its zeros are what was pruned."""
    found = MaskSet.from_zeros(model, find_layers(model, layers))
    return Checkpoint(model, found if found.sparsity > 0 else None, record)


def save_imported(
    folder: Path, model: nn.Module, uri: str, chosen: str, *, model_args: Mapping[str, Any]
) -> None:
    """Write the folder of a model whose weights came from the file ``uri``, of which they are ``chosen``."""
    name = PurePosixPath(uri).name
    source = f"{name}: {chosen}" if chosen else name
    save_checkpoint(folder, model, model_args=model_args, masks=None, record={"source": source})


@contextmanager
def open_verified(uri: str, *, key: str = "checkpoint") -> Iterator[tuple[Path, dict[str, Any]]]:
    """A folder as :func:`fetched`, checked, and its record.

    Raises:
        InputError: as :func:`fetched` and :func:`verify`.
    """
    with fetched(uri, key=key) as folder:
        yield folder, verify(folder, uri, key=key)


@contextmanager
def fetched(uri: str, *, key: str, shared: bool = False) -> Iterator[Path]:
    """A folder (any pyarrow URI) on this machine for as long as it is needed, unchecked.

    Of a file of weights that says what model it is of, a folder is made.

    Args:
        shared: a copy stays for the other processes of this machine (:mod:`trainers.data.node_cache`).

    Raises:
        InputError: nothing is there, or it cannot be reached.
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
    """Raises:
    InputError: no folder (or file of weights) is there, or it cannot be reached.
    """
    if is_weights_file(uri) and info(uri, key=key).type == fs.FileType.File:
        return
    if info(uri, key=key).type != fs.FileType.Directory:
        raise InputError(key, uri, f"no such folder; must hold {CONFIG} and {WEIGHTS}")


def pack_folder(source: Path, target: Path, record: Mapping[str, Any]) -> list[str]:
    """Write the compressed form of a checkpoint folder; returns the names of the tensors that are packed.

    Args:
        source: a folder that :func:`verify` finds nothing wrong with, and its ``record``.
        target: a folder that is there, and empty.

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
    """Whether a folder is a compressed one."""
    return (folder / PACKED_WEIGHTS).is_file() and not (folder / WEIGHTS).exists()


def _packed(folder: Path, uri: str, key: str) -> tuple[dict[str, Tensor], MaskSet | None]:
    try:
        return read_packed(folder / PACKED_WEIGHTS)
    except ValueError as error:
        raise InputError(key, uri, f"{PACKED_WEIGHTS} holds no packed weights ({error})") from None


def verify(folder: Path, uri: str, *, key: str = "checkpoint") -> dict[str, Any]:
    """Check a local checkpoint folder without loading its weights; returns its record (``{}`` if foreign).

    Raises:
        InputError: naming the file that is missing, truncated or foreign.
    """
    if not folder.is_dir():
        raise InputError(key, uri, f"no such folder; must hold {CONFIG} and {WEIGHTS}")
    if (folder / QUANTIZATION_RECORD).is_file():
        raise InputError(key, uri, "is quantised already: an INT8 model, which ONNX Runtime alone runs")
    weights = PACKED_WEIGHTS if is_packed(folder) else WEIGHTS
    for name in (CONFIG, weights):
        if not (folder / name).is_file():
            raise InputError(key, uri, f"{name} is missing; must be a timm checkpoint folder")
        if name == CONFIG:
            _refuse_transformers(folder, uri, key)
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


def _refuse_transformers(folder: Path, uri: str, key: str) -> None:
    try:
        foreign = transformers_model(json.loads((folder / CONFIG).read_text()))
    except ValueError:
        return  # no JSON, which is said in other words
    if foreign is not None:
        raise InputError(key, uri, f"{CONFIG} must be timm's; this is {foreign}")


def read_ranges(folder: Path) -> dict[str, Tensor] | None:
    """The ranges of a model that was trained for INT8; ``None`` of any other."""
    return load_file(folder / RANGES) if (folder / RANGES).exists() else None


def model_args(folder: Path) -> dict[str, Any]:
    """The arguments with which timm builds the folder's architecture."""
    arguments: dict[str, Any] = json.loads((folder / CONFIG).read_text()).get("model_args") or {}
    return arguments


def size_on_disk(folder: Path) -> int:
    """Bytes of the weights and masks."""
    files = (WEIGHTS, MASKS, PACKED_WEIGHTS)
    return sum((folder / name).stat().st_size for name in files if (folder / name).exists())


def weights_hash(uri: str) -> str:
    """SHA-256 of a folder's ``model.safetensors``; of a compressed one, of that from which it was made.

    Of an INT8 one it is that of its ``model.onnx``, of a file of weights its own.
    """
    if is_weights_file(uri):
        return storage.sha256(uri)
    if storage.exists(f"{uri}/{WEIGHTS}"):
        return storage.sha256(f"{uri}/{WEIGHTS}")
    if storage.exists(f"{uri}/{QUANTIZATION_RECORD}"):
        about = storage.read_json(f"{uri}/{QUANTIZATION_RECORD}")
        return str(about.get("packed_from") or about["files"]["model.onnx"])
    record = storage.read_json(f"{uri}/{PRUNING_RECORD}") if storage.exists(f"{uri}/{PRUNING_RECORD}") else {}
    return str(record.get("packed_from") or storage.sha256(f"{uri}/{PACKED_WEIGHTS}"))


def versions() -> dict[str, str]:
    """Versions of what the result depends on."""
    packages = installed("espalier", "torch", "timm", "ray", "optuna", "mlflow")
    return {"python": platform.python_version(), **packages}
