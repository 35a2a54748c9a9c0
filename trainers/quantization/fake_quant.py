"""Quantization by torchao: a model is traced, calibrated or trained with fake quantization, and converted.

Weights are symmetric, with a scale for each output channel and no zero point, so that zero is exactly zero in
int8; activations have one scale and one zero point for a tensor, and 8 bits without sign. That is the
configuration of ``X86InductorQuantizer``, which ONNX Runtime and OpenVINO can run, except for the range of
the weights, which is :data:`WEIGHTS`. Linear layers and convolutions are quantized with their inputs; norms,
softmax and residual sums stay in float32.

The traced graph shares the parameters of the model from which it was traced: training one trains both.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from pruners.errors import InputError
from trainers import distributed
from trainers.optional_imports import quietly, require
from trainers.quantization.checks import check_mode

_LOW, _HIGH = ".min", ".max"
WEIGHTS = (-64, 63)
"""The smallest and the largest int8 value of a weight: seven of the eight bits.

Processors with AVX2 or AVX-512 but without VNNI add pairs of products in 16 bits, which overflow with the
full range (the logits of a small Swin then differ by 0.027, relative, from torch's INT8; with this range by
0.003). With seven bits a file gives the same answers on all processors. ONNX Runtime's ``reduce_range`` is
the same.
"""


class Prepared(nn.Module):
    """A model with an observer, or a fake quantizer, at every input and weight that will be int8.

    Evaluation does not change the ranges. In quantization-aware training (``aware``) each forward pass moves
    the ranges a little, and computes with the values that int8 can hold; gradients pass the rounding
    unchanged (straight-through estimator; Jacob et al., 2018, "Quantization and Training of Neural Networks
    for Efficient Integer-Arithmetic-Only Inference").

    Args:
        model: a timm model, on its device; its mode is left as it is.
        size: (channels, height, width) of an image; the batch size is free.
        aware: prepare for training, not for calibration.

    Raises:
        InputError: the extra 'deploy' is not installed, or a model with batch norms is to be trained.
    """

    def __init__(self, model: nn.Module, size: tuple[int, int, int], *, aware: bool) -> None:
        super().__init__()
        require("quantize", "int8", "torchao")
        if aware:
            check_mode(model, "qat", (), "mode")
        self.aware, self.size = aware, size
        self.traced = _prepare(model, size, aware=aware)
        self._points = list(_fake_quantizers(self.traced))

    def forward(self, images: Tensor) -> Any:
        """Map images (N, channels, height, width) to logits (N, classes)."""
        return self.traced(images)

    def train(self, mode: bool = True) -> Prepared:
        """Switch between training and evaluation, which freezes the ranges and computes scales from them."""
        self.training = mode
        if self.aware:
            for _, quantizer in self._points:
                quantizer.enable_observer(mode)
                if not mode:
                    _rescale(quantizer)
        return self

    @torch.no_grad()
    def calibrate(self, batches: Iterable[Tensor]) -> None:
        """Set the ranges from some images; a model for quantization-aware training is then ready.

        Args:
            batches: images (N, channels, height, width), normalised, on the model's device.

        Raises:
            InputError: images of another shape than the model takes.
        """
        self.train()
        for images in batches:
            if tuple(images.shape[1:]) != self.size:
                expected = f"the model takes {self.size}, as (channels, height, width)"
                raise InputError("calibration", tuple(images.shape[1:]), expected)
            self.traced(images)

    @torch.no_grad()
    def average_ranges(self) -> None:
        """Average the ranges of activations over the workers, each of which has seen other images.

        The ranges of weights are the same on all workers, as the weights are.
        """
        if not distributed.active():
            return
        ends = [
            end for _, quantizer in self._points if not quantizer.is_per_channel for end in _ends(quantizer)
        ]
        means = distributed.mean_over_workers(torch.cat([end.reshape(-1) for end in ends]))
        for end, mean in zip(ends, torch.split(means, [end.numel() for end in ends]), strict=True):
            end.copy_(mean.view_as(end))

    def ranges(self) -> dict[str, Tensor]:
        """The current ranges, by ``LAYER.weight.min``, ``LAYER.weight.max``, ``LAYER.input.min`` …"""
        return {
            f"{name}{suffix}": end.detach().cpu().clone()
            for name, quantizer in self._points
            for suffix, end in zip((_LOW, _HIGH), _ends(quantizer), strict=True)
        }

    @torch.no_grad()
    def set_ranges(self, ranges: Mapping[str, Tensor]) -> None:
        """Restore ranges that :meth:`ranges` returned.

        Raises:
            KeyError: ranges of another model.
        """
        for name, quantizer in self._points:
            for suffix, end in zip((_LOW, _HIGH), _ends(quantizer), strict=True):
                stored = ranges[f"{name}{suffix}"]
                end.resize_(stored.shape).copy_(stored)
            _rescale(quantizer)

    def convert(self) -> Converted:
        """Convert to a model with int8 weights, on the CPU; the prepared model cannot be used afterwards."""
        from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e

        self.eval()
        layers = {user.name: weight for weight, user in _weights(self.traced)}
        with quietly():
            return Converted(convert_pt2e(self.traced.cpu()), layers)


class Converted(nn.Module):
    """A model with int8 weights, and operations that quantize and dequantize; for evaluation alone.

    Args:
        graph: the converted graph.
        layers: names of the quantized parameters, by the nodes that use them.

    Attributes:
        weights: names of the parameters that are int8 now, by the names of their buffers.
    """

    def __init__(self, graph: GraphModule, layers: Mapping[str, str]) -> None:
        super().__init__()
        self.traced = graph
        self.weights = {}
        for node in graph.graph.nodes:
            if "dequantize_per_channel" in str(node.target):
                (user,) = node.users
                self.weights[f"traced.{node.args[0].target}"] = layers[user.name]
        self.training = False

    def forward(self, images: Tensor) -> Any:
        """Map images (N, channels, height, width) to logits (N, classes)."""
        return self.traced(images)

    def train(self, mode: bool = True) -> Converted:
        """Do nothing: the model has one mode, and the traced graph would raise."""
        return self


def _fake_quantizers(graph: GraphModule) -> Iterator[tuple[str, Any]]:
    """The fake quantizers of a graph, by the names of what they quantize; observers are not among them."""
    from torchao.quantization.pt2e.fake_quantize import FakeQuantizeBase

    takers = {user.name: weight for weight, user in _weights(graph)}
    for node in graph.graph.nodes:
        if node.op == "call_module":
            module = graph.get_submodule(str(node.target))
            if isinstance(module, FakeQuantizeBase):
                yield _name(node, takers), module


def _prepare(model: nn.Module, size: tuple[int, int, int], *, aware: bool) -> GraphModule:
    with quietly():
        from torchao.quantization.pt2e.quantize_pt2e import prepare_pt2e, prepare_qat_pt2e
        from torchao.quantization.pt2e.quantizer.x86_inductor_quantizer import (
            get_default_x86_inductor_quantization_config,
        )

        device, training = next(model.parameters()).device, model.training
        example = torch.zeros(2, *size, device=device)  # torch would treat a batch of one as a constant
        model.eval()
        try:
            traced = torch.export.export(
                model, (example,), dynamic_shapes=({0: torch.export.Dim("batch")},)
            ).module()
        finally:
            model.train(training)
        config = get_default_x86_inductor_quantization_config(is_qat=aware)
        weight = replace(config.weight, quant_min=WEIGHTS[0], quant_max=WEIGHTS[1])
        quantizer = _every_weight(replace(config, weight=weight))
        prepared: GraphModule = (prepare_qat_pt2e if aware else prepare_pt2e)(traced, quantizer)
        return prepared


def _every_weight(config: Any) -> Any:
    """A quantizer of all linear layers and convolutions, whichever module or function they are traced from.

    torchao's quantizer finds torch's modules only: it leaves out what timm calls as a function (the qkv of
    SwinV2 and BEiT, whose bias is concatenated) and timm's own modules (TensorFlow's padding).
    """
    from torchao.quantization.pt2e.quantizer import QuantizationAnnotation
    from torchao.quantization.pt2e.quantizer.x86_inductor_quantizer import X86InductorQuantizer

    aten = torch.ops.aten
    layers = (aten.linear.default, aten.conv2d.default, aten.conv2d.padding)

    class EveryWeight(X86InductorQuantizer):  # type: ignore[misc]  # untyped
        def annotate(self, model: GraphModule) -> GraphModule:
            super().annotate(model)
            for node in model.graph.nodes:
                if node.target not in layers or "quantization_annotation" in node.meta:
                    continue
                images, weight = node.args[0], node.args[1]
                if isinstance(weight, Node) and weight.op == "get_attr":
                    specs: dict[Any, Any] = {images: config.input_activation, weight: config.weight}
                    node.meta["quantization_annotation"] = QuantizationAnnotation(
                        input_qspec_map=specs, _annotated=True
                    )
            return model

    return EveryWeight().set_global(config)


def _ends(point: Any) -> tuple[Tensor, Tensor]:
    """The two ends of a fake quantizer's range."""
    return point.activation_post_process.min_val, point.activation_post_process.max_val


def _rescale(point: Any) -> None:
    """Compute scale and zero point from the current range."""
    for current, computed in zip((point.scale, point.zero_point), point.calculate_qparams(), strict=True):
        current.resize_(computed.shape).copy_(computed)


def _weights(graph: GraphModule) -> Iterator[tuple[str, Node]]:
    """The names of quantized weights, and the nodes that use them."""
    for node in graph.graph.nodes:
        if node.op == "get_attr":
            for observer in node.users:
                if observer.op == "call_module":
                    yield from ((str(node.target), user) for user in observer.users)


def _name(point: Node, takers: Mapping[str, str]) -> str:
    """``LAYER.weight``, or ``LAYER.input`` for an activation, named by the first layer that uses it."""
    source = point.args[0]
    if isinstance(source, Node) and source.op == "get_attr":
        return str(source.target)
    layer = next((takers[user.name] for user in point.users if user.name in takers), None)
    return str(point.target) if layer is None else f"{layer.removesuffix('.weight')}.input"
