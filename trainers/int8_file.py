"""A quantised model as an ONNX file: its int8 weights by the names of the parameters that they were.

An int8 weight is in timm's layout, or bears ``.T`` after its name where the file holds it transposed (inputs
by outputs). Its zero points are 0, so that a pruned weight is 0.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from pruners.masks import MaskSet
from trainers import models
from trainers.onnx_export import FILE, export_onnx, quantise_onnx
from trainers.optional import require
from trainers.preprocessing import metadata_of, preprocessing_of
from trainers.quantize import Converted

if TYPE_CHECKING:
    from onnx import ModelProto

_TURNED = ".T"


def write_static(path: Path, converted: Converted, model: nn.Module, labels: list[str] | None = None) -> None:
    """Write a calibrated or trained model as ONNX: weights in int8, fixed ranges of activations (QDQ).

    Args:
        model: what it was made from, for the preprocessing.
        labels: names of the classes.
    """
    import onnx

    metadata = metadata_of(preprocessing_of(model, labels))
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
