"""Reconstruction of a pruned model, layer by layer, from unlabelled images."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from typing import TypeGuard

import torch
from torch import Tensor, nn

from pruners.elimination.gradients import evaluating
from pruners.errors import InputError
from pruners.model.layers import PrunableLayer
from pruners.model.masks import MaskSet
from pruners.reconstruction.least_squares import Moments, Summed, solve
from pruners.reconstruction.lockstep import Lockstep

IMAGES = 1024
"""Images that a reconstruction takes unless it is told otherwise."""
RIDGE = 0.01
"""λ, as a share of the mean variance of a layer's inputs."""

Progress = Callable[[str, int, int], None]
Solvable = nn.Linear | nn.Conv2d


def single_process(tensor: Tensor) -> Tensor:
    """The sum over all workers where there is one: what it has."""
    return tensor


@dataclass(frozen=True)
class Reconstruction:
    """What :func:`reconstruct` did.

    Attributes:
        images: number of images.
        errors: for each layer the squared error of its outputs against the dense model's, as a share of
            their variance, before and after.
        left: layers that stay as the method left them, as they are neither linear nor a plain convolution.
    """

    images: int
    errors: dict[str, tuple[float, float]] = field(default_factory=dict)
    left: tuple[str, ...] = ()


def reconstruct(
    model: nn.Module,
    dense: nn.Module,
    layers: Sequence[PrunableLayer],
    masks: MaskSet,
    images: Iterable[Tensor],
    *,
    ridge: float = RIDGE,
    summed: Summed = single_process,
    progress: Progress | None = None,
) -> Reconstruction:
    """Solve the kept weights of a pruned model again, in place, so that its layers answer as before.

    For each layer, in the order of the forward pass, the kept weights and the bias minimise
    E |W x̂ + b - y|² + λ |W - W₀|², where x̂ is what the layer receives in the pruned model, all layers before
    being solved already, and y what it answered in the dense one. So a layer also makes good what those
    before it got wrong. A norm before a layer needs no new scale or shift: they act on the layer's inputs one
    by one, and so does a column of its weights, and its bias.

    One forward pass over the images, of both models; memory for the activations of all images at one layer.
    Of several workers each takes some of the images; the moments are summed, and all solve the same.

    Args:
        model: the pruned model.
        dense: what it was before, on the same device.
        layers: its prunable layers.
        masks: ``True`` for kept weights.
        images: batches of them, (batch, channels, height, width), without labels.
        ridge: λ, as a share of the mean variance of a layer's inputs.
        summed: sums over the workers, each of which calls this function with images of its own.
        progress: is called with ``"layers solved"``, how many are done, and how many there are.

    Returns:
        What was done.

    Raises:
        InputError: there are no images, no layer can be solved, or an activation is not finite.
    """
    like = next(model.parameters())
    batches = [batch.to(like.device, like.dtype) for batch in images]
    if not batches:
        raise InputError("reconstruct", None, "needs images")
    names = {layer.name.removesuffix(".weight"): layer.name for layer in layers}
    takes: dict[str, Solvable] = {
        name: module for name, module in model.named_modules() if name in names and _solvable(module)
    }
    if not takes:
        raise InputError(
            "reconstruct", type(model).__name__, "has no linear or plain convolution among its layers"
        )
    left = tuple(parameter for name, parameter in names.items() if name not in takes)
    number = torch.tensor(sum(map(len, batches)), device=like.device)
    summed(number)
    report = Reconstruction(int(number), left=left)
    targets = {name: module for name, module in dense.named_modules() if name in takes}
    with (
        torch.no_grad(),
        evaluating(model),
        evaluating(dense),
        closing(Lockstep(model, takes, batches, outputs=False).stops()) as receives,
        closing(Lockstep(dense, targets, batches, outputs=True).stops()) as answers,
    ):
        for inputs, outputs in zip(receives, answers, strict=True):
            name, parameter = inputs[0].layer, names[inputs[0].layer]
            if outputs[0].layer != name:
                raise RuntimeError(
                    f"the dense model calls {outputs[0].layer} where the pruned one calls {name}"
                )
            module = takes[name]
            weight = module.weight.flatten(1)
            moments = Moments(weight.shape[1], len(weight), weight, bias=module.bias is not None)
            for received, answered in zip(inputs, outputs, strict=True):
                moments.add(_columns(module, received.tensor), _rows(module, answered.tensor))
            moments.sum_over(summed)
            if not moments.finite:
                raise InputError("reconstruct", parameter, "receives or answers what is not finite")
            report.errors[parameter] = _solve_module(module, moments, masks[parameter], ridge)
            if progress is not None:
                progress("layers solved", len(report.errors), len(takes))
    return report


def _solve_module(module: Solvable, moments: Moments, mask: Tensor, ridge: float) -> tuple[float, float]:
    """Give a layer new weights and a new bias; returns its relative error before and after."""
    weight = module.weight.flatten(1)
    solved = solve(moments, weight, mask.flatten(1), ridge)
    before, after = moments.error(weight), moments.error(solved)
    module.weight.copy_(solved.view_as(module.weight))
    if module.bias is not None:
        module.bias.copy_(moments.offset(solved))
    return before, after


def solvable_layers(model: nn.Module, layers: Sequence[PrunableLayer]) -> list[PrunableLayer]:
    """Those of a model's layers that :func:`reconstruct` can solve."""
    modules = dict(model.named_modules())
    return [layer for layer in layers if _solvable(modules.get(layer.name.removesuffix(".weight")))]


def _solvable(module: nn.Module | None) -> TypeGuard[Solvable]:
    """Whether a module is a product of its weight with its inputs, which this file can repeat."""
    if isinstance(module, nn.Conv2d):
        pointwise = module.kernel_size == (1, 1) and module.padding in ((0, 0), "valid")
        plain = type(module) is nn.Conv2d and module.padding_mode == "zeros"  # timm's others pad on their own
        return module.groups == 1 and (pointwise or (plain and not isinstance(module.padding, str)))
    return isinstance(module, nn.Linear)


def _columns(module: Solvable, x: Tensor) -> Tensor:
    """What each output of a layer is a product with: (tokens, inputs)."""
    if isinstance(module, nn.Linear):
        return x.reshape(-1, x.shape[-1])
    assert not isinstance(module.padding, str) or module.kernel_size == (1, 1)
    padding = (0, 0) if isinstance(module.padding, str) else module.padding
    patches = nn.functional.unfold(x, module.kernel_size, module.dilation, padding, module.stride)
    return patches.transpose(1, 2).flatten(0, 1)


def _rows(module: Solvable, y: Tensor) -> Tensor:
    """A layer's answers as (tokens, outputs)."""
    return (
        y.reshape(-1, y.shape[-1]) if isinstance(module, nn.Linear) else y.permute(0, 2, 3, 1).flatten(0, 2)
    )
