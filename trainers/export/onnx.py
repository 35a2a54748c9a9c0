"""Export a model to an ONNX file, for any engine that reads ONNX; quantize the file by ONNX Runtime."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from pruners.errors import InputError, first_line
from trainers.data.preprocessing import PREPROCESSING, Images, Preprocessing
from trainers.export.torch_export import captured
from trainers.optional_imports import quietly, require

ONNX_FILE = "model.onnx"
INPUT, OUTPUT = "images", "logits"
_LINEAR = ["MatMul", "Gemm"]
_CALIBRATION_BATCH = 32
_MOST_BYTES = 2**31 - 2**20  # weights in one file: the limit of a protobuf message, less room for the graph


def export_onnx(
    model: nn.Module, path: Path, input_size: tuple[int, int, int], metadata: Mapping[str, str]
) -> None:
    """Write a model as one ONNX file with its weights, float32, for any batch size.

    The file's input is :data:`INPUT`, (batch, channels, height, width), normalised; its output
    :data:`OUTPUT`, (batch, classes). No path of this machine is written into it.

    >>> export_onnx(model, Path("model.onnx"), (3, 16, 16), {"labels": "cat, dog, fox, owl"})
    >>> read_metadata(Path("model.onnx"))["labels"]
    'cat, dog, fox, owl'

    Args:
        model: a timm model.
        path: the file to write.
        input_size: (channels, height, width).
        metadata: kept in the file as ONNX's ``metadata_props``.

    Raises:
        InputError: ONNX's libraries are missing, or the model has operations that ONNX lacks (named).
    """
    require("export", "onnx", "onnx", "onnxscript")
    import torch
    from onnx_ir.passes.common import ClearMetadataAndDocStringPass

    if sum(weight.numel() for weight in model.state_dict().values()) * 4 >= _MOST_BYTES:
        raise InputError("model", type(model).__name__, "has more weights than one ONNX file holds (2 GiB)")
    program = captured(model, input_size)
    try:
        with quietly():
            made = torch.onnx.export(
                program, input_names=[INPUT], output_names=[OUTPUT], dynamo=True, verbose=False
            )
    except Exception as error:  # the exporter's own errors, and those of the libraries that it uses
        raise InputError("model", type(model).__name__, _unsupported(error)) from None
    assert made is not None, "an exporter that is given no file returns the program"
    graph = made.model.graph
    made.rename_axes({str(graph.inputs[0].shape[0]): "batch"})
    ClearMetadataAndDocStringPass()(made.model)  # the exporter notes the source file of each operation
    made.model.metadata_props.update(metadata)
    proto = made.model_proto
    # shapes of intermediate tensors: quantizers fail on them after they have transposed a weight
    del proto.graph.value_info[:]
    path.write_bytes(proto.SerializeToString())


def quantize_onnx(source: Path, target: Path, images: Images | None = None) -> None:
    """Quantize a float32 file that :func:`export_onnx` wrote to INT8; zeros stay exact zeros.

    Weights are quantized symmetrically (zero point 0), with a scale for each output channel. Without
    ``images`` the ranges of activations are computed at run time (dynamic quantization), which needs no
    calibration and leaves convolutions in float32.

    Args:
        source: the float32 file.
        target: the INT8 file to write.
        images: for calibration, (N, channels, height, width), normalised: the ranges of activations are then
            fixed (static quantization).

    Raises:
        InputError: ONNX Runtime is missing.
    """
    require("export", "onnx-int8", "onnx", "onnxruntime")
    from onnxruntime import quantization

    common: dict[str, Any] = {
        "per_channel": True,
        "weight_type": quantization.QuantType.QInt8,
        "reduce_range": True,  # weights in seven bits, see trainers.quantization.fake_quant.WEIGHTS
    }
    with quietly():
        if images is None:
            quantization.quantize_dynamic(source, target, op_types_to_quantize=_LINEAR, **common)
        else:
            quantization.quantize_static(
                source,
                target,
                _reader(images),
                quant_format=quantization.QuantFormat.QDQ,
                activation_type=quantization.QuantType.QUInt8,
                op_types_to_quantize=[*_LINEAR, "Conv"],
                nodes_to_exclude=_kept_in_float(source),
                extra_options={"WeightSymmetric": True},
                **common,
            )


def read_metadata(path: Path) -> dict[str, str]:
    """The ``metadata_props`` of a file."""
    import onnx

    model = onnx.load(path, load_external_data=False)
    return {entry.key: entry.value for entry in model.metadata_props}


def read_preprocessing(path: Path) -> Preprocessing:
    """The description of images and classes in a file that espalier wrote: see
    :mod:`trainers.data.preprocessing`."""
    preprocessing: Preprocessing = json.loads(read_metadata(path)[PREPROCESSING])
    return preprocessing


def int8_values(path: Path) -> int:
    """Number of int8 weights in a file, without their scales and zero points."""
    import onnx

    tensors = onnx.load(path).graph.initializer
    int8 = (tensor for tensor in tensors if tensor.data_type == onnx.TensorProto.INT8)
    return sum(math.prod(tensor.dims) for tensor in int8 if len(tensor.dims) > 1)


def _kept_in_float(path: Path) -> list[str]:
    """Names of the nodes that stay in float32.

    These are products of two activations, which ONNX Runtime 1.31 computes wrongly in INT8 after its
    optimiser has fused them (a relative error of 0.15 on a small ViT, instead of 0.009), and the convolution
    of the image: with three input channels INT8 is no faster, and costs accuracy.
    """
    import onnx

    graph = onnx.load(path).graph
    weights = {weight.name for weight in graph.initializer}

    def stays(node: onnx.NodeProto) -> bool:
        if node.op_type == "Conv":
            return node.input[0] == INPUT or node.input[1] not in weights
        return node.op_type == "MatMul" and not weights & set(node.input)

    return [node.name for node in graph.node if stays(node)]


def _reader(images: Images) -> Any:
    """A reader of batches of images for ONNX Runtime's calibration."""
    from onnxruntime.quantization import CalibrationDataReader

    class Reader(CalibrationDataReader):  # type: ignore[misc]  # untyped
        def __init__(self) -> None:
            self._batches: Iterator[Images] = iter(
                images[begin : begin + _CALIBRATION_BATCH]
                for begin in range(0, len(images), _CALIBRATION_BATCH)
            )

        def get_next(self) -> dict[str, Images] | None:
            batch = next(self._batches, None)
            return None if batch is None else {INPUT: batch}

    return Reader()


def _unsupported(error: BaseException) -> str:
    """The torch operations that ONNX lacks, as far as the exporter names them."""
    text, cause = "", error.__cause__
    while cause is not None:
        text, cause = f"{text}\n{cause}", cause.__cause__
    named = re.findall(r"No ONNX function found for <OpOverload\(op='([^']+)'", f"{error}\n{text}")
    if named:
        return f"has operations that ONNX has not: {', '.join(sorted(set(named)))}"
    return f"cannot be exported to ONNX ({first_line(error)})"
