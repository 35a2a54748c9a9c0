"""Gradients of the training loss for the Fisher, in eval mode: of small batches, or of single samples."""

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

Gradients = dict[str, Tensor]
"""Some gradients of each layer, (k, *shape), by parameter name."""

_SAMPLES = 16  # gradients of single samples that are held at a time


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
    """The first ``limit`` gradients (or all), masked by ``masks``: one of each batch's mean loss.

    The model's mode and its parameters' ``grad`` are left as they were.

    Args:
        per_sample: one of each image's loss instead (by ``torch.func``), a few at a time.
    """
    take = _of_samples if per_sample else _of_batch
    found = 0
    pruned = {name: mask for name, mask in masks.items() if not bool(mask.all())}
    source = iter(batches)
    with _eval(model):
        while limit is None or found < limit:
            batch = next(source, None)
            if batch is None:
                return
            for some in take(model, layers, batch, loss):
                left = None if limit is None else limit - found
                kept = {
                    name: (gradient * pruned[name] if name in pruned else gradient)[:left]
                    for name, gradient in some.items()
                }
                found += len(next(iter(kept.values())))
                yield kept
                if found == limit:
                    return


def mean_loss(model: nn.Module, batches: Iterable[Batch], loss: Loss) -> tuple[float, int]:
    """Sum of the loss over images, and their number, in eval mode."""
    total, images = 0.0, 0
    with _eval(model), torch.no_grad():
        for batch in batches:
            inputs, labels = _placed(model, batch)
            total += float(loss(model(inputs), labels)) * len(inputs)
            images += len(inputs)
    return total, images


def _of_batch(
    model: nn.Module, layers: Sequence[PrunableLayer], batch: Batch, loss: Loss
) -> Iterator[Gradients]:
    parameters = dict(model.named_parameters())
    images, labels = _placed(model, batch)
    value = loss(model(images), labels)
    found = torch.autograd.grad(value, [parameters[layer.name] for layer in layers])
    yield {layer.name: gradient.unsqueeze(0) for layer, gradient in zip(layers, found, strict=True)}


def _of_samples(
    model: nn.Module, layers: Sequence[PrunableLayer], batch: Batch, loss: Loss
) -> Iterator[Gradients]:
    values = {name: parameter.detach() for name, parameter in model.named_parameters()}
    wanted = {layer.name: values.pop(layer.name) for layer in layers}

    def of_one(weights: Gradients, image: Tensor, label: Tensor) -> Tensor:
        outputs = torch.func.functional_call(model, {**values, **weights}, (image.unsqueeze(0),))
        return loss(outputs, label.unsqueeze(0))

    of_some = torch.func.vmap(torch.func.grad(of_one), in_dims=(None, 0, 0))
    images, labels = _placed(model, batch)
    for start in range(0, len(images), _SAMPLES):
        some = slice(start, start + _SAMPLES)
        with sdpa_kernel(SDPBackend.MATH):  # the fused attentions know no vmap
            found = of_some(wanted, images[some], labels[some])
        yield found


def _placed(model: nn.Module, batch: Batch) -> Batch:
    """A batch where the model is, and in its type."""
    weight = next(parameter for parameter in model.parameters() if parameter.is_floating_point())
    images, labels = batch
    return images.to(weight.device, weight.dtype), labels.to(weight.device)


@contextmanager
def _eval(model: nn.Module) -> Iterator[None]:
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in training.items():
            module.training = mode
