"""Convert an ONNX file to OpenVINO's ``model.xml`` (graph) and ``model.bin`` (weights), float32 or INT8."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from trainers.data.preprocessing import Images
from trainers.optional_imports import import_openvino, openvino_core, quietly, require

OPENVINO_FILE = "model.xml"
_BATCH = 32


def export_openvino(
    onnx: Path,
    path: Path,
    metadata: Mapping[str, str],
    images: Images | None = None,
    *,
    attention: bool = True,
) -> None:
    """Write an OpenVINO model from a file of :func:`trainers.export.onnx.export_onnx`.

    Weights stay float32: by default OpenVINO would store them as float16.

    Args:
        onnx: the ONNX file.
        path: the ``.xml`` file to write; the ``.bin`` file is written beside it.
        metadata: kept in the file as ``rt_info``.
        images: for calibration, (N, channels, height, width), normalised: the model is then quantized to INT8
            by NNCF.
        attention: whether the model is a transformer, for which NNCF keeps softmax and normalisation in
            floating point.

    Raises:
        InputError: OpenVINO, or NNCF for INT8, is missing.
    """
    require("export", "openvino", "openvino")
    with quietly():
        openvino = import_openvino()
        model = openvino_core().read_model(onnx)
        if images is not None:
            require("export", "openvino-int8", "nncf")
            import nncf

            parameters = nncf.AdvancedQuantizationParameters
            in_float = [name.get_friendly_name() for name in _heads_of_pooled_norms(model)]
            smooth = nncf.AdvancedSmoothQuantParameters
            batches = [images[begin : begin + _BATCH] for begin in range(0, len(images), _BATCH)]
            model = nncf.quantize(
                model,
                nncf.Dataset(batches),
                model_type=nncf.ModelType.TRANSFORMER if attention else None,
                preset=nncf.QuantizationPreset.MIXED,  # as for transformers: activations have zero points
                subset_size=len(batches),
                ignored_scope=nncf.IgnoredScope(names=in_float) if in_float else None,
                advanced_parameters=parameters(
                    # seven bits, as in ONNX files: sums of eight overflow on processors without VNNI
                    overflow_fix=nncf.OverflowFix.ENABLE,
                    # with SmoothQuant of NNCF 3.4 the logits of a Swin come out 1.4 times too large
                    smooth_quant_alphas=smooth(convolution=-1, matmul=-1),
                ),
            )
        for name, value in metadata.items():
            model.set_rt_info(value, [name])
        openvino.save_model(model, path, compress_to_fp16=False)


def _heads_of_pooled_norms(model: Any) -> Iterator[Any]:
    """Matrix products that take the mean of a norm without a shift.

    On CPUs OpenVINO 2026.4 computes such a mean wrongly where it is written as INT8: logits were 0.2 to 0.6
    off, relative to the largest (``findings/openvino-mean-of-scaled-norm.sh``).
    """
    for mean in model.get_ops():
        if mean.get_type_name() == "ReduceMean" and not _is_shifted(mean.input_value(0).get_node()):
            for target in mean.output(0).get_target_inputs():
                if target.get_node().get_type_name() == "MatMul":
                    yield target.get_node()


def _is_shifted(node: Any) -> bool:
    """False for a scaling alone: ``Multiply``, or ``Add`` of zeros."""
    if node.get_type_name() != "Add":
        return bool(node.get_type_name() != "Multiply")
    added = node.input_value(1).get_node()
    return bool(added.get_type_name() != "Constant" or added.data.any())


def int8_values(path: Path) -> int:
    """Number of int8 weights in a file, without their scales and zero points."""
    constants = [
        node for node in openvino_core().read_model(path).get_ops() if node.get_type_name() == "Constant"
    ]
    kinds = {"i8", "u8"}
    count: int = sum(
        math.prod(node.get_output_shape(0))
        for node in constants
        if node.get_element_type().get_type_name() in kinds and len(node.get_output_shape(0)) > 1
    )
    return count


def read_metadata(path: Path, *names: str) -> dict[str, str]:
    """Entries of ``rt_info`` by their names; missing ones are left out."""
    model = openvino_core().read_model(path)
    return {name: str(model.get_rt_info([name]).value) for name in names if model.has_rt_info([name])}
