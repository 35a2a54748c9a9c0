"""Gradients of the training loss for the Fisher: model in eval mode, one small batch's mean loss each."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from pruners.layers import PrunableLayer

Batch = tuple[Tensor, Tensor]
"""Images (N, C, H, W) and labels (N,)."""

Loss = Callable[[Tensor, Tensor], Tensor]


def batch_gradients(
    model: nn.Module,
    layers: Sequence[PrunableLayer],
    masks: Mapping[str, Tensor],
    batches: Iterable[Batch],
    loss: Loss,
    *,
    limit: int | None = None,
) -> Iterator[dict[str, Tensor]]:
    """One gradient a batch, masked by ``masks``, for all batches or the first ``limit``.

    The model's mode and its parameters' ``grad`` are left as they were.
    """
    parameters = dict(model.named_parameters())
    wanted = [parameters[layer.name] for layer in layers]
    device = wanted[0].device
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        for images, labels in itertools.islice(batches, limit):
            value = loss(model(images.to(device)), labels.to(device))
            gradients = torch.autograd.grad(value, wanted)
            yield {
                layer.name: gradient * masks[layer.name].to(device)
                for layer, gradient in zip(layers, gradients, strict=True)
            }
    finally:
        for module, mode in training.items():
            module.training = mode
