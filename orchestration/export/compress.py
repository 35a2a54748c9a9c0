"""``espalier export`` and ``espalier pull``: write checkpoint folders, completely or not at all."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from orchestration.commands.model_source import as_checkpoint_folder, resolved
from orchestration.commands.output import free_folder, whole_folder
from pruners.errors import InputError
from trainers.checkpoint.folder import is_packed, pack_folder, size_on_disk, verify
from trainers.export.onnx import ONNX_FILE
from trainers.quantization.int8_folder import ENGINE, PACKED_MODEL, is_int8, pack, read_record
from trainers.storage import absolute


def compress(checkpoint: str, out: str, tracking_uri: str | None, storage: str) -> list[str]:
    """Write the compressed form of a checkpoint.

    Args:
        checkpoint: folder, ``hf-hub:NAME`` or ``models:/NAME@alias``.
        out: the folder to write.
        tracking_uri: MLflow's; ``None``: that of the storage.
        storage: of the sweeps whose registry is meant.

    Returns:
        Lines about what was written.

    Raises:
        InputError: a checkpoint that cannot be had or used, or a folder that is there or cannot be.
    """
    target = free_folder(out, "OUT")
    with resolved(checkpoint, tracking_uri, storage) as location:
        if "://" not in location and is_int8(Path(absolute(location))):
            return list(_compress_int8(Path(absolute(location)), checkpoint, target, out))
        return list(_compress(location, target, out))


def _compress_int8(source: Path, checkpoint: str, target: Path, out: str) -> Iterator[str]:
    record = read_record(source, checkpoint, key="model")
    with whole_folder(target, out, "OUT") as folder:
        pack(source, folder, record)
    after = (target / PACKED_MODEL).stat().st_size
    yield f"{'packed':<12}the file of {ENGINE}"
    yield f"{'size':<12}{_gained(record['bytes'], after)}"
    yield f"{'written to':<12}{out} ({after / 1e6:.2f} MB, INT8)"
    yield f"{'run it by':<12}the example in docs/guides/quantization.md; espalier takes it as it is"


def _compress(location: str, target: Path, out: str) -> Iterator[str]:
    with as_checkpoint_folder(location) as (source, record):
        before = size_on_disk(source)
        with whole_folder(target, out, "OUT") as folder:
            packed = pack_folder(source, folder, record)
    after = size_on_disk(target)
    nothing = "" if packed else "; nothing was gained: no tensor has zeros enough"
    yield f"{'packed':<12}{len(packed)} tensors with zeros; all others are as they were"
    yield f"{'size':<12}{_gained(before, after)}{nothing}"
    yield from _end(target, out)


def _gained(before: int, after: int) -> str:
    return f"{before / 1e6:.2f} MB → {after / 1e6:.2f} MB ({100 * after / before:.0f} %)"


def pull(reference: str, dest: str, tracking_uri: str | None, storage: str) -> list[str]:
    """Copy the checkpoint folder of a registered version.

    Args:
        reference: ``models:/NAME@alias`` or ``models:/NAME/VERSION``.
        dest: the folder to write.
        tracking_uri: MLflow's; ``None``: that of the storage.
        storage: of the sweeps whose registry is meant.

    Returns:
        Lines about what was written.

    Raises:
        InputError: no such version, a registry that does not answer, a damaged folder, or one that is there.
    """
    if not reference.startswith("models:/"):
        raise InputError("model", reference, "must be models:/NAME@alias or models:/NAME/VERSION")
    target = free_folder(dest, "DEST")
    with resolved(reference, tracking_uri, storage) as location, whole_folder(target, dest, "DEST") as folder:
        shutil.copytree(location, folder, dirs_exist_ok=True)
        is_quantized = is_int8(folder)
        record = (read_record if is_quantized else verify)(folder, reference, key="model")
    checked = f"{len(record['files'])} files as recorded" if record else "none are recorded"
    return [
        f"{'model':<12}{record.get('method', 'unknown')}, sparsity {100 * record.get('sparsity', 0.0):.2f} %",
        f"{'checksums':<12}{checked}",
        *(_end(target, dest) if not is_quantized else _end_of_int8(target, dest, record)),
    ]


def _end_of_int8(target: Path, path_text: str, record: Mapping[str, Any]) -> Iterator[str]:
    yield f"{'written to':<12}{path_text} ({record['bytes'] / 1e6:.2f} MB, INT8)"
    yield f"{'run it by':<12}onnxruntime.InferenceSession({str(target / ONNX_FILE)!r})"


def _end(target: Path, path_text: str) -> Iterator[str]:
    yield f"{'written to':<12}{path_text} ({size_on_disk(target) / 1e6:.2f} MB)"
    if is_packed(target):
        reader = f"load_packed({str(target)!r}) of docs/guides/export.md"
        yield f"{'load it by':<12}{reader}; espalier takes it as it is"
    else:
        yield f"{'load it by':<12}timm.create_model({f'local-dir:{target}'!r}, pretrained=True)"
