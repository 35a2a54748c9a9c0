"""Gradients of the training loss for the Fisher, in eval mode: of small batches, or of single images."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from pruners.model.layers import PrunableLayer

Batch = tuple[Tensor, Tensor]
"""Images (N, C, H, W) and labels (N,)."""

Loss = Callable[[Tensor, Tensor], Tensor]
"""The mean loss (a scalar) of outputs (N, classes) and labels (N,)."""

Gradients = dict[str, Tensor]
"""k gradients of each layer, (k, *shape), by parameter name."""

_SAMPLES = 16  # images whose gradients are computed at a time


def gradients(
    model: nn.Module,
    layers: Sequence[PrunableLayer],
    masks: Mapping[str, Tensor],
    batches: Iterable[Batch],
    loss: Loss,
    *,
    limit: int | None = None,
    per_sample: bool = False,
) -> Iterator[Gradients]:
    """Compute gradients of the loss, one for each batch or one for each image.

    The model's mode and its parameters' ``grad`` are left as they were.

    Args:
        model: the model, in any mode.
        layers: whose gradients are wanted.
        masks: by parameter name; gradients of pruned weights (``False``) are zero.
        batches: images and labels, on any device.
        loss: the mean loss of a batch.
        limit: number of gradients at most; default all that the batches give.
        per_sample: one gradient for each image (by ``torch.func``) instead of one for each batch.

    Yields:
        Some gradients at a time: for each layer (k, *shape), by parameter name.
    """
    compute = _of_samples if per_sample else _of_batch
    count = 0
    pruned = {name: mask for name, mask in masks.items() if not bool(mask.all())}
    source = iter(batches)
    with evaluating(model):
        while limit is None or count < limit:
            batch = next(source, None)
            if batch is None:
                return
            for computed in compute(model, layers, batch, loss):
                left = None if limit is None else limit - count
                kept = {
                    name: (gradient * pruned[name] if name in pruned else gradient)[:left]
                    for name, gradient in computed.items()
                }
                count += len(next(iter(kept.values())))
                yield kept
                if count == limit:
                    return


def summed_loss(model: nn.Module, batches: Iterable[Batch], loss: Loss) -> tuple[float, int]:
    """Add up the loss over images, in eval mode and without gradients.

    Args:
        model: the model, in any mode; it is left as it was.
        batches: images and labels, on any device.
        loss: the mean loss of a batch.

    Returns:
        The sum of the loss over all images, and their number.
    """
    total, images = 0.0, 0
    with evaluating(model), torch.no_grad():
        for batch in batches:
            inputs, labels = _on_device_of(model, batch)
            total += float(loss(model(inputs), labels)) * len(inputs)
            images += len(inputs)
    return total, images


def _of_batch(
    model: nn.Module, layers: Sequence[PrunableLayer], batch: Batch, loss: Loss
) -> Iterator[Gradients]:
    parameters = dict(model.named_parameters())
    images, labels = _on_device_of(model, batch)
    value = loss(model(images), labels)
    computed = torch.autograd.grad(value, [parameters[layer.name] for layer in layers])
    yield {layer.name: gradient.unsqueeze(0) for layer, gradient in zip(layers, computed, strict=True)}


def _of_samples(
    model: nn.Module, layers: Sequence[PrunableLayer], batch: Batch, loss: Loss
) -> Iterator[Gradients]:
    others = {name: parameter.detach() for name, parameter in model.named_parameters()}
    weights = {layer.name: others.pop(layer.name) for layer in layers}

    def loss_of_image(weights: Gradients, image: Tensor, label: Tensor) -> Tensor:
        outputs = torch.func.functional_call(model, {**others, **weights}, (image.unsqueeze(0),))
        return loss(outputs, label.unsqueeze(0))

    gradients_of_images = torch.func.vmap(torch.func.grad(loss_of_image), in_dims=(None, 0, 0))
    images, labels = _on_device_of(model, batch)
    for start in range(0, len(images), _SAMPLES):
        chunk = slice(start, start + _SAMPLES)
        with sdpa_kernel(SDPBackend.MATH):  # the fused attention kernels do not support vmap
            computed = gradients_of_images(weights, images[chunk], labels[chunk])
        yield computed


def _on_device_of(model: nn.Module, batch: Batch) -> Batch:
    """Move a batch to the device of a model, and its images to the model's type."""
    weight = next(parameter for parameter in model.parameters() if parameter.is_floating_point())
    images, labels = batch
    return images.to(weight.device, weight.dtype), labels.to(weight.device)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put a model into eval mode; each of its modules has its own mode back afterwards."""
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in training.items():
            module.training = mode
