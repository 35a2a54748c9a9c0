"""The INT8 folder: a quantised model for ONNX Runtime, beside the float checkpoint that it came from.

``model.onnx`` is the model, its preprocessing in the file's metadata; ``config.json`` the parent's (timm's:
architecture, classes, preprocessing); ``masks.safetensors`` the parent's masks, where it has some;
``quantization.json`` the record: mode, engine, the parent's hash, figures, versions, checksums. There is no
pickle, and there are no float weights: timm does not load this folder.

In the file an int8 weight bears the name of the parameter that it was, in timm's layout, or with ``.T`` after
it where the file holds it transposed (inputs by outputs). Its zero points are 0, so a pruned weight is 0.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from pruners.errors import InputError
from pruners.masks import MaskSet
from trainers import models
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
from trainers.onnx_export import FILE, export_onnx, quantise_onnx
from trainers.optional import require
from trainers.preprocessing import metadata_of, preprocessing_of
from trainers.quantize import Prepared
from trainers.quantize_settings import Mode

if TYPE_CHECKING:
    from onnx import ModelProto

RECORD = QUANTISED
NEEDS = ("torchao", "onnx", "onnxscript", "onnxruntime")
"""Packages, all of the extra ``deploy``."""
FORMAT = "espalier-int8-1"
ENGINE = "onnxruntime"
_TURNED = ".T"
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


def write_static(path: Path, prepared: Prepared, model: nn.Module, labels: list[str] | None = None) -> None:
    """Write a calibrated or trained model as ONNX: weights in int8, fixed ranges of activations (QDQ).

    Args:
        prepared: is used up.
        model: what it was made from, for the preprocessing.
        labels: names of the classes.
    """
    import onnx

    metadata = metadata_of(preprocessing_of(model, labels))
    converted = prepared.convert()
    export_onnx(converted, path, models.input_size(model), metadata)
    written = onnx.load(path)
    _rename(written, converted.weights)
    onnx.save(written, path)


def write_dynamic(path: Path, model: nn.Module, labels: list[str] | None = None) -> None:
    """Write a model as ONNX with int8 weights, whose activations are measured as they come."""
    require("quantize", "int8", "onnx", "onnxscript", "onnxruntime")
    import onnx

    metadata = metadata_of(preprocessing_of(model, labels))
    with tempfile.TemporaryDirectory(prefix="espalier-") as place:
        plain = Path(place) / FILE
        export_onnx(model, plain, models.input_size(model), metadata)
        quantise_onnx(plain, path)
        names = _by_content(onnx.load(plain), dict(model.named_parameters()))
    written = onnx.load(path)
    # as ONNX Runtime names what it makes of a weight
    _rename(written, {f"{old}_quantized": new for old, new in names.items()})
    onnx.helper.set_model_props(written, metadata)
    onnx.save(written, path)


@dataclass(frozen=True)
class Int8Weight:
    """As timm lays it out, and whether all of its zero points are 0."""

    values: NDArray[np.int8]
    symmetric: bool


def read_weights(path: Path) -> dict[str, Int8Weight]:
    """The int8 weights of a file by the names of the parameters that they were."""
    import onnx

    return dict(_weights(onnx.load(path)))


def check_zeros(path: Path, masks: MaskSet) -> int:
    """Whether every pruned weight reads 0 in the file; returns how many there are.

    Raises:
        RuntimeError: the layer where one does not, or that has no int8 weight.
    """
    found, zeros = read_weights(path), 0
    for name, mask in masks.items():
        weight = found.get(name)
        if weight is None:
            raise RuntimeError(f"{name} is pruned, and has no int8 weight in {path.name}")
        if not weight.symmetric:
            raise RuntimeError(f"{name} has zero points that are not 0 in {path.name}")
        pruned = ~mask.numpy()
        if weight.values[pruned].any():
            raise RuntimeError(f"{name} has pruned weights that are not 0 in {path.name}")
        zeros += int(pruned.sum())
    return zeros


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
        RuntimeError: a pruned weight that is not 0 in the file.
    """
    require("mode", mode, *NEEDS)
    parent = verify(source, str(source), key=key)
    loaded = load_checkpoint(str(source), key=key)
    model = loaded.model.eval()
    if mode == "dynamic":
        write_dynamic(folder / FILE, model, labels)
    else:
        prepared = Prepared(model, models.input_size(model), aware=mode == "qat")
        if mode == "qat":
            prepared.set_ranges(_ranges_of(source, key))
        else:
            prepared.calibrate(images)
        write_static(folder / FILE, prepared, model, labels)
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
        "figures": dict(figures(Int8Model(folder / FILE))),
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


def _weights(model: ModelProto) -> Iterator[tuple[str, Int8Weight]]:
    from onnx import TensorProto, numpy_helper

    tensors = {one.name: one for one in model.graph.initializer}
    # operation: places of the weight and of its zero point among the inputs
    places = {"DequantizeLinear": (0, 2), "MatMulInteger": (1, 3)}
    for node in model.graph.node:
        if node.op_type not in places:
            continue
        weight, zero = places[node.op_type]
        tensor = tensors.get(node.input[weight])
        if tensor is None or tensor.data_type != TensorProto.INT8:
            continue  # an activation
        values = numpy_helper.to_array(tensor)
        name = tensor.name
        if name.endswith(_TURNED):
            name, values = name.removesuffix(_TURNED), values.T
        points = node.input[zero] if len(node.input) > zero else ""
        symmetric = not points or not numpy_helper.to_array(tensors[points]).any()
        yield name, Int8Weight(values, symmetric)


def _rename(model: ModelProto, names: Mapping[str, str]) -> None:
    """Give initialisers other names, wherever they are read.

    Raises:
        RuntimeError: there is none of a name.
    """
    missing = names.keys() - {one.name for one in model.graph.initializer}
    if missing:
        raise RuntimeError(f"the exporter lost {', '.join(sorted(missing))}")
    for one in model.graph.initializer:
        one.name = names.get(one.name, one.name)
    for node in model.graph.node:
        for place, name in enumerate(node.input):
            node.input[place] = names.get(name, name)


def _by_content(model: ModelProto, parameters: Mapping[str, Tensor]) -> dict[str, str]:
    """Initialisers of two dimensions that are parameters, transposed (``.T``) or not, by what is in them.

    The exporter transposes the weights of linear layers, and their names are lost on the way.
    """
    from onnx import numpy_helper

    known: dict[tuple[tuple[int, ...], bytes], str] = {}
    for name, parameter in parameters.items():
        if parameter.dim() == 2:
            values = parameter.detach().numpy()
            for turned in (name, f"{name}{_TURNED}"):
                array = values.T if turned != name else values
                known.setdefault((array.shape, np.ascontiguousarray(array).tobytes()), turned)
    used = {name for node in model.graph.node if node.op_type in ("MatMul", "Gemm") for name in node.input}
    found = {}
    for one in model.graph.initializer:
        if one.name in used and len(one.dims) == 2:
            values = numpy_helper.to_array(one)
            parameter_name = known.get((values.shape, values.tobytes()))
            if parameter_name is not None:
                found[one.name] = parameter_name
    return found


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
