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

from pruners.model.masks import MaskSet
from trainers.data.preprocessing import metadata_of, preprocessing_of
from trainers.export.onnx import ONNX_FILE, export_onnx, quantize_onnx
from trainers.models import factory
from trainers.optional_imports import require
from trainers.quantization.fake_quant import Converted

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto

_TURNED = ".T"


def write_static(path: Path, converted: Converted, model: nn.Module, labels: list[str] | None = None) -> None:
    """Write a calibrated or trained model as ONNX: weights in int8, fixed ranges of activations (QDQ).

    Args:
        model: what it was made from, for the preprocessing.
        labels: names of the classes.
    """
    import onnx

    metadata = metadata_of(preprocessing_of(model, labels))
    export_onnx(converted, path, factory.input_size(model), metadata)
    written = onnx.load(path)
    _part(written)
    names = {known: converted.weights[buffer] for known, buffer in _buffers(written, converted).items()}
    _rename(written, names)
    onnx.save(written, path)


def write_dynamic(path: Path, model: nn.Module, labels: list[str] | None = None) -> None:
    """Write a model as ONNX with int8 weights, whose activations are measured as they come."""
    require("quantize", "int8", "onnx", "onnxscript", "onnxruntime")
    import onnx

    metadata = metadata_of(preprocessing_of(model, labels))
    with tempfile.TemporaryDirectory(prefix="espalier-") as place:
        plain = Path(place) / ONNX_FILE
        export_onnx(model, plain, factory.input_size(model), metadata)
        graph = onnx.load(plain)
        _part(graph)
        onnx.save(graph, plain)
        quantize_onnx(plain, path)
        names = _by_content(graph, dict(model.named_parameters()))
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


def _part(model: ModelProto) -> None:
    """Give each operation a weight of its own: the exporter keeps one of several that are equal."""
    while (shared := _shared(model)) is not None:
        name, (_, *users) = shared
        for number, (node, place) in enumerate(users):
            other = f"{name}_{number}"
            node.input[place] = other
            for position, maker in enumerate(model.graph.node):
                if name in maker.output:
                    copied = type(maker)()
                    copied.CopyFrom(maker)
                    copied.name, copied.output[0] = f"{maker.name}_{number}", other
                    model.graph.node.insert(position + 1, copied)
                    break
            else:
                weight = next(one for one in model.graph.initializer if one.name == name)
                added = model.graph.initializer.add()
                added.CopyFrom(weight)
                added.name = other


def _shared(model: ModelProto) -> tuple[str, list[tuple[NodeProto, int]]] | None:
    """A weight, or what is made of one, that several operations take; and where these take it."""
    weights = {one.name for one in model.graph.initializer if len(one.dims) > 1}
    users: dict[str, list[tuple[NodeProto, int]]] = {}
    for node in model.graph.node:
        if node.op_type in ("DequantizeLinear", "Transpose") and node.input[0] in weights:
            weights.add(node.output[0])
        for place, name in enumerate(node.input):
            users.setdefault(name, []).append((node, place))
    return next(((name, found) for name, found in users.items() if name in weights and len(found) > 1), None)


def _buffers(model: ModelProto, converted: Converted) -> dict[str, str]:
    """The names of int8 initialisers, and of the buffers that they were: of copies, one with their values.

    Weights that the exporter has computed away, as those of position tables, are none of them.
    """
    from onnx import numpy_helper

    tensors = {one.name: one for one in model.graph.initializer}
    found = {name: name for name in converted.weights if name in tensors}
    copies = {
        name: numpy_helper.to_array(one)
        for name, one in tensors.items()
        if name not in found and one.data_type == one.INT8 and len(one.dims) > 1
    }
    values = dict(converted.named_buffers()) | dict(converted.named_parameters())
    for buffer in converted.weights.keys() - found.keys():
        expected = values[buffer].numpy()
        name = next((name for name, one in copies.items() if np.array_equal(one, expected)), None)
        if name is not None:
            found[name] = buffer
            del copies[name]
    return found


def _by_content(model: ModelProto, parameters: Mapping[str, Tensor]) -> dict[str, str]:
    """Initialisers of two dimensions that are parameters, by what is in them, with the names for their INT8.

    The exporter transposes the weights of linear layers, and their names are lost on the way; ONNX Runtime
    transposes those that are left (of ``Gemm`` with ``transB``).
    """
    from onnx import numpy_helper

    known: dict[tuple[tuple[int, ...], bytes], list[tuple[str, bool]]] = {}
    for name, parameter in parameters.items():
        if parameter.dim() == 2:
            values = parameter.detach().numpy()
            for array, turned in ((values, False), (values.T, True)):
                key = array.shape, np.ascontiguousarray(array).tobytes()
                known.setdefault(key, []).append((name, turned))
    tensors = {one.name: one for one in model.graph.initializer if len(one.dims) == 2}
    found: dict[str, str] = {}
    given: set[str] = set()
    for node in model.graph.node:
        weight = next((name for name in node.input if name in tensors), None)
        if node.op_type not in ("MatMul", "Gemm") or weight is None:
            continue
        values = numpy_helper.to_array(tensors[weight])
        turns = any(one.name == "transB" and one.i for one in node.attribute)
        for name, turned in known.get((values.shape, values.tobytes()), []):
            if name not in given:
                given.add(name)
                found[weight] = f"{name}{_TURNED}" if turned != turns else name
                break
    return found
