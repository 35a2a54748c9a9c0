"""INT8 by torchao: a model traced, observed or trained with fake quantisation, and converted.

Weights are symmetric, a scale for each output channel and no zero point, so that zero is exactly zero in
int8; activations have one scale and zero point a tensor, of 8 bits without sign. That is what
``X86InductorQuantizer`` asks for, and what ONNX Runtime and OpenVINO run as it stands, but for the weights'
range, which is :data:`WEIGHTS`. Linear layers and convolutions are quantised with their inputs; norms,
softmax and the sums between blocks stay in float32.

The traced graph holds the very parameters of the model that it was traced from: who trains one trains both.
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
"""Seven of the eight bits: processors with AVX2 or AVX-512 and without VNNI add pairs of products in 16 bits,
and two of full range do not fit (a small Swin then answers 0.027 beside torch's INT8, relative, with these
0.003). So a file says the same on all of them. ONNX Runtime's ``reduce_range`` is the same."""


class Prepared(nn.Module):
    """A model with an observer, or a fake quantiser, at every input and weight that will be int8.

    Evaluation changes no range. In training (``aware``) each forward moves the ranges a little, and computes
    with the values that int8 can hold; gradients go straight through (Jacob et al., 2018).

    Args:
        model: a timm model, on its device; its mode is left as it is.
        size: (channels, height, width) of an image; the batch is free.
        aware: for training, instead of for calibration.

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
        self._points = list(_fake_quantisers(self.traced))

    def forward(self, images: Tensor) -> Any:
        return self.traced(images)

    def train(self, mode: bool = True) -> Prepared:
        """Evaluation holds the ranges, and takes its scales from them."""
        self.training = mode
        if self.aware:
            for _, one in self._points:
                one.enable_observer(mode)
                if not mode:
                    _rescale(one)
        return self

    @torch.no_grad()
    def calibrate(self, batches: Iterable[Tensor]) -> None:
        """Let the observers see some images; a model for training is then ready to be trained.

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
    def agree(self) -> None:
        """Give all workers the mean of their ranges: each has seen other images.

        Those of weights are the same everywhere, as the weights are.
        """
        if not distributed.active():
            return
        ends = [end for _, one in self._points if not one.is_per_channel for end in _ends(one)]
        means = distributed.mean_over_workers(torch.cat([end.reshape(-1) for end in ends]))
        for end, mean in zip(ends, torch.split(means, [end.numel() for end in ends]), strict=True):
            end.copy_(mean.view_as(end))

    def ranges(self) -> dict[str, Tensor]:
        """The ranges as they stand: ``LAYER.weight.min`` and ``.max``, of its inputs ``LAYER.input.min`` …"""
        return {
            f"{name}{suffix}": end.detach().cpu().clone()
            for name, one in self._points
            for suffix, end in zip((_LOW, _HIGH), _ends(one), strict=True)
        }

    @torch.no_grad()
    def set_ranges(self, ranges: Mapping[str, Tensor]) -> None:
        """Go on from ranges of before.

        Raises:
            KeyError: ranges of another model.
        """
        for name, one in self._points:
            for suffix, end in zip((_LOW, _HIGH), _ends(one), strict=True):
                known = ranges[f"{name}{suffix}"]
                end.resize_(known.shape).copy_(known)
            _rescale(one)

    def convert(self) -> Converted:
        """The model with int8 weights, on the CPU; what was prepared is used up."""
        from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e

        self.eval()
        layers = {user.name: weight for weight, user in _weights(self.traced)}
        with quietly():
            return Converted(convert_pt2e(self.traced.cpu()), layers)


class Converted(nn.Module):
    """Quantised weights between operations that quantise and dequantise; one mode, evaluation.

    Attributes:
        weights: the parameters that are int8 now, by the names of their buffers.
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
        return self.traced(images)

    def train(self, mode: bool = True) -> Converted:
        """Nothing to switch; the traced graph would refuse."""
        return self


def _fake_quantisers(graph: GraphModule) -> Iterator[tuple[str, Any]]:
    """By the names of what they quantise (the observers of calibration are none)."""
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
        example = torch.zeros(2, *size, device=device)  # of one image the batch would be taken as fixed
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
    """A quantiser of all linear layers and convolutions, whichever module or function they are traced from.

    torchao's own knows them as modules of torch: it leaves out what timm calls as a function (SwinV2's and
    BEiT's qkv, whose bias is put together) and modules of timm's own (TensorFlow's padding).
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
                    wanted: dict[Any, Any] = {images: config.input_activation, weight: config.weight}
                    node.meta["quantization_annotation"] = QuantizationAnnotation(
                        input_qspec_map=wanted, _annotated=True
                    )
            return model

    return EveryWeight().set_global(config)


def _ends(point: Any) -> tuple[Tensor, Tensor]:
    return point.activation_post_process.min_val, point.activation_post_process.max_val


def _rescale(point: Any) -> None:
    """Take scale and zero point from the range as it stands."""
    for mine, found in zip((point.scale, point.zero_point), point.calculate_qparams(), strict=True):
        mine.resize_(found.shape).copy_(found)


def _weights(graph: GraphModule) -> Iterator[tuple[str, Node]]:
    """The names of quantised weights, and the nodes that take them."""
    for node in graph.graph.nodes:
        if node.op == "get_attr":
            for observer in node.users:
                if observer.op == "call_module":
                    yield from ((str(node.target), user) for user in observer.users)


def _name(point: Node, takers: Mapping[str, str]) -> str:
    """``LAYER.weight``, or ``LAYER.input`` by the first layer that takes what is quantised there."""
    source = point.args[0]
    if isinstance(source, Node) and source.op == "get_attr":
        return str(source.target)
    layer = next((takers[user.name] for user in point.users if user.name in takers), None)
    return str(point.target) if layer is None else f"{layer.removesuffix('.weight')}.input"
