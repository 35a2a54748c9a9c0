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
"""Default number of images of a reconstruction."""
RIDGE = 0.01
"""λ, as a share of the mean variance of a layer's inputs."""

Progress = Callable[[str, int, int], None]
Solvable = nn.Linear | nn.Conv2d


def single_process(tensor: Tensor) -> Tensor:
    """Return the tensor itself: the sum over all workers, if there is only one."""
    return tensor


@dataclass(frozen=True)
class Reconstruction:
    """The report of :func:`reconstruct`.

    Attributes:
        images: number of images.
        errors: for each layer the squared error of its outputs against the dense model's, as a share of
            their variance, before and after.
        left: layers that were not reconstructed, because they are neither linear nor a plain convolution.
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
    """Solve the kept weights of a pruned model again, in place, so that its layers' outputs match the dense
    model's.

    For each layer, in the order of the forward pass, the kept weights and the bias minimise
    E |W x̂ + b - y|² + λ |W - W₀|². Here x̂ is the layer's input in the pruned model, whose earlier layers are
    solved already, and y the layer's output in the dense model. A layer therefore also corrects the errors of
    the layers before it. The scale and shift of a norm before a layer need not be solved: they act on single
    inputs of the layer, as its columns of weights and its bias do.

    It takes one forward pass of both models over the images, and memory for the activations of all images at
    one layer. Each of several workers takes some of the images; their moments are summed, and all workers
    solve the same problem.

    Args:
        model: the pruned model.
        dense: the model before pruning, on the same device.
        layers: its prunable layers.
        masks: ``True`` for kept weights.
        images: batches of them, (batch, channels, height, width), without labels.
        ridge: λ, as a share of the mean variance of a layer's inputs.
        summed: sums a tensor over the workers; each worker calls this function with its own images.
        progress: is called with ``"layers solved"``, the number done, and the number in all.

    Returns:
        The report.

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
    """Give a layer new weights and a new bias; return its relative error before and after."""
    weight = module.weight.flatten(1)
    solved = solve(moments, weight, mask.flatten(1), ridge)
    before, after = moments.error(weight), moments.error(solved)
    module.weight.copy_(solved.view_as(module.weight))
    if module.bias is not None:
        module.bias.copy_(moments.offset(solved))
    return before, after


def solvable_layers(model: nn.Module, layers: Sequence[PrunableLayer]) -> list[PrunableLayer]:
    """The layers of a model that :func:`reconstruct` can solve."""
    modules = dict(model.named_modules())
    return [layer for layer in layers if _solvable(modules.get(layer.name.removesuffix(".weight")))]


def _solvable(module: nn.Module | None) -> TypeGuard[Solvable]:
    """Return whether a module is a plain product of its weights and inputs, as :func:`_columns` gives."""
    if isinstance(module, nn.Conv2d):
        pointwise = module.kernel_size == (1, 1) and module.padding in ((0, 0), "valid")
        plain = type(module) is nn.Conv2d and module.padding_mode == "zeros"  # timm's others pad on their own
        return module.groups == 1 and (pointwise or (plain and not isinstance(module.padding, str)))
    return isinstance(module, nn.Linear)


def _columns(module: Solvable, x: Tensor) -> Tensor:
    """The inputs of a layer as a matrix (tokens, inputs), whose product with the weights is its output."""
    if isinstance(module, nn.Linear):
        return x.reshape(-1, x.shape[-1])
    assert not isinstance(module.padding, str) or module.kernel_size == (1, 1)
    padding = (0, 0) if isinstance(module.padding, str) else module.padding
    patches = nn.functional.unfold(x, module.kernel_size, module.dilation, padding, module.stride)
    return patches.transpose(1, 2).flatten(0, 1)


def _rows(module: Solvable, y: Tensor) -> Tensor:
    """The outputs of a layer as a matrix (tokens, outputs)."""
    return (
        y.reshape(-1, y.shape[-1]) if isinstance(module, nn.Linear) else y.permute(0, 2, 3, 1).flatten(0, 2)
    )
