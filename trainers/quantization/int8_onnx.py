"""Write a quantized model as an ONNX file whose int8 weights have the names of the model's parameters.

An int8 weight has timm's layout; where the file holds it transposed (inputs by outputs) its name ends with
``.T``. Its zero points are 0, so that a pruned weight is 0.
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

_TRANSPOSED = ".T"


def write_static(path: Path, converted: Converted, model: nn.Module, labels: list[str] | None = None) -> None:
    """Write a converted model as ONNX (QDQ): weights in int8, and fixed ranges of activations.

    Args:
        path: the file to write.
        converted: a model that was calibrated or trained, and converted.
        model: the float model, for its preprocessing.
        labels: names of the classes.
    """
    import onnx

    metadata = metadata_of(preprocessing_of(model, labels))
    export_onnx(converted, path, factory.input_size(model), metadata)
    written = onnx.load(path)
    _separate_weights(written)
    names = {name: converted.weights[buffer] for name, buffer in _buffers(written, converted).items()}
    _rename(written, names)
    onnx.save(written, path)


def write_dynamic(path: Path, model: nn.Module, labels: list[str] | None = None) -> None:
    """Write a model as ONNX with int8 weights, whose ranges of activations are computed at run time.

    Args:
        path: the file to write.
        model: the float model.
        labels: names of the classes.

    Raises:
        InputError: a library of the extra ``deploy`` is missing.
    """
    require("quantize", "int8", "onnx", "onnxscript", "onnxruntime")
    import onnx

    metadata = metadata_of(preprocessing_of(model, labels))
    with tempfile.TemporaryDirectory(prefix="espalier-") as directory:
        plain = Path(directory) / ONNX_FILE
        export_onnx(model, plain, factory.input_size(model), metadata)
        graph = onnx.load(plain)
        _separate_weights(graph)
        onnx.save(graph, plain)
        quantize_onnx(plain, path)
        names = _by_content(graph, dict(model.named_parameters()))
    written = onnx.load(path)
    # ONNX Runtime adds this suffix to the name of a weight that it quantizes
    _rename(written, {f"{old}_quantized": new for old, new in names.items()})
    onnx.helper.set_model_props(written, metadata)
    onnx.save(written, path)


@dataclass(frozen=True)
class Int8Weight:
    """An int8 weight in timm's layout, and whether all of its zero points are 0."""

    values: NDArray[np.int8]
    symmetric: bool


def read_weights(path: Path) -> dict[str, Int8Weight]:
    """The int8 weights of a file, by the names of the model's parameters."""
    import onnx

    return dict(_weights(onnx.load(path)))


def check_zeros(path: Path, masks: MaskSet) -> int:
    """Check that every pruned weight is 0 in the file, and return how many there are.

    Raises:
        RuntimeError: a pruned weight that is not 0, or a pruned layer without an int8 weight; names the
            layer.
    """
    weights, zeros = read_weights(path), 0
    for name, mask in masks.items():
        weight = weights.get(name)
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

    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    # operation: indices of the weight and of its zero point among the inputs
    inputs = {"DequantizeLinear": (0, 2), "MatMulInteger": (1, 3)}
    for node in model.graph.node:
        if node.op_type not in inputs:
            continue
        weight, zero = inputs[node.op_type]
        tensor = tensors.get(node.input[weight])
        if tensor is None or tensor.data_type != TensorProto.INT8:
            continue  # an activation
        values = numpy_helper.to_array(tensor)
        name = tensor.name
        if name.endswith(_TRANSPOSED):
            name, values = name.removesuffix(_TRANSPOSED), values.T
        points = node.input[zero] if len(node.input) > zero else ""
        symmetric = not points or not numpy_helper.to_array(tensors[points]).any()
        yield name, Int8Weight(values, symmetric)


def _rename(model: ModelProto, names: Mapping[str, str]) -> None:
    """Rename initialisers, and the inputs of all nodes that read them.

    Raises:
        RuntimeError: there is no initialiser of a name.
    """
    missing = names.keys() - {tensor.name for tensor in model.graph.initializer}
    if missing:
        raise RuntimeError(f"the exporter lost {', '.join(sorted(missing))}")
    for tensor in model.graph.initializer:
        tensor.name = names.get(tensor.name, tensor.name)
    for node in model.graph.node:
        for index, name in enumerate(node.input):
            node.input[index] = names.get(name, name)


def _separate_weights(model: ModelProto) -> None:
    """Give each operation a weight of its own: the exporter merges weights that are equal."""
    while (shared := _shared(model)) is not None:
        name, (_, *users) = shared
        for number, (node, index) in enumerate(users):
            other = f"{name}_{number}"
            node.input[index] = other
            for position, maker in enumerate(model.graph.node):
                if name in maker.output:
                    copied = type(maker)()
                    copied.CopyFrom(maker)
                    copied.name, copied.output[0] = f"{maker.name}_{number}", other
                    model.graph.node.insert(position + 1, copied)
                    break
            else:
                weight = next(tensor for tensor in model.graph.initializer if tensor.name == name)
                added = model.graph.initializer.add()
                added.CopyFrom(weight)
                added.name = other


def _shared(model: ModelProto) -> tuple[str, list[tuple[NodeProto, int]]] | None:
    """A weight, or a tensor computed from one, that several operations use; and which inputs use it."""
    weights = {tensor.name for tensor in model.graph.initializer if len(tensor.dims) > 1}
    users: dict[str, list[tuple[NodeProto, int]]] = {}
    for node in model.graph.node:
        if node.op_type in ("DequantizeLinear", "Transpose") and node.input[0] in weights:
            weights.add(node.output[0])
        for index, name in enumerate(node.input):
            users.setdefault(name, []).append((node, index))
    return next(
        ((name, takers) for name, takers in users.items() if name in weights and len(takers) > 1), None
    )


def _buffers(model: ModelProto, converted: Converted) -> dict[str, str]:
    """Names of int8 initialisers, each with the buffer that it was; renamed copies are found by their values.

    Weights that the exporter folded into constants, as those of position tables, are not among them.
    """
    from onnx import numpy_helper

    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    buffers = {name: name for name in converted.weights if name in tensors}
    copies = {
        name: numpy_helper.to_array(tensor)
        for name, tensor in tensors.items()
        if name not in buffers and tensor.data_type == tensor.INT8 and len(tensor.dims) > 1
    }
    values = dict(converted.named_buffers()) | dict(converted.named_parameters())
    for buffer in converted.weights.keys() - buffers.keys():
        expected = values[buffer].numpy()
        name = next((name for name, tensor in copies.items() if np.array_equal(tensor, expected)), None)
        if name is not None:
            buffers[name] = buffer
            del copies[name]
    return buffers


def _by_content(model: ModelProto, parameters: Mapping[str, Tensor]) -> dict[str, str]:
    """Find the parameters of two dimensions among the initialisers by their values, and name their INT8 form.

    The exporter transposes the weights of linear layers, and loses their names; ONNX Runtime transposes the
    rest (of ``Gemm`` with ``transB``).
    """
    from onnx import numpy_helper

    known: dict[tuple[tuple[int, ...], bytes], list[tuple[str, bool]]] = {}
    for name, parameter in parameters.items():
        if parameter.dim() == 2:
            values = parameter.detach().numpy()
            for array, transposed in ((values, False), (values.T, True)):
                key = array.shape, np.ascontiguousarray(array).tobytes()
                known.setdefault(key, []).append((name, transposed))
    tensors = {tensor.name: tensor for tensor in model.graph.initializer if len(tensor.dims) == 2}
    names: dict[str, str] = {}
    given: set[str] = set()
    for node in model.graph.node:
        weight = next((name for name in node.input if name in tensors), None)
        if node.op_type not in ("MatMul", "Gemm") or weight is None:
            continue
        values = numpy_helper.to_array(tensors[weight])
        transposes = any(attribute.name == "transB" and attribute.i for attribute in node.attribute)
        for name, transposed in known.get((values.shape, values.tobytes()), []):
            if name not in given:
                given.add(name)
                names[weight] = f"{name}{_TRANSPOSED}" if transposed != transposes else name
                break
    return names
