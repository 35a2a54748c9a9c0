"""Gradients of the training loss for the Fisher: model in eval mode, one small batch's mean loss each."""

from __future__ import annotations

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
    limit: int,
) -> Iterator[dict[str, Tensor]]:
    """One gradient a batch, masked by ``masks``, for at most ``limit`` batches.

    The model's mode and its parameters' ``grad`` are left as they were.
    """
    parameters = dict(model.named_parameters())
    wanted = [parameters[layer.name] for layer in layers]
    device = wanted[0].device
    training = model.training
    model.eval()
    try:
        for _, (images, labels) in zip(range(limit), batches, strict=False):
            value = loss(model(images.to(device)), labels.to(device))
            gradients = torch.autograd.grad(value, wanted)
            yield {
                layer.name: gradient * masks[layer.name].to(device)
                for layer, gradient in zip(layers, gradients, strict=True)
            }
    finally:
        model.train(training)
