"""Evaluate a model: top-1 and loss over a loader, with the images divided among the workers."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from trainers.distributed import sum_over_workers
from trainers.host_memory import keep_freed_memory

_LOSS_CAP = 20.0


@dataclass(frozen=True)
class Evaluation:
    """The result of an evaluation over all workers.

    Attributes:
        top1: share of correct predictions, 0…1.
        loss: mean cross-entropy.
        images: number of images.
    """

    top1: float
    loss: float
    images: int

    @property
    def score(self) -> float:
        """Top-1 less a small share of the loss: orders by top-1 and, where that is equal, by loss."""
        return self.top1 - min(self.loss, _LOSS_CAP) / (_LOSS_CAP * 2 * self.images)

    @classmethod
    def over(cls, parts: Sequence[Evaluation]) -> Evaluation:
        """The evaluation of several sets of images together."""
        images = sum(part.images for part in parts)
        top1 = sum(part.top1 * part.images for part in parts) / images
        return cls(top1, sum(part.loss * part.images for part in parts) / images, images)


@torch.no_grad()
def evaluate(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]]) -> Evaluation:
    """Evaluate a model in eval mode; its mode is restored.

    Args:
        model: maps images (N, 3, H, W) to logits (N, classes); a model without parameters runs on the CPU.
        batches: this worker's (images (N, 3, H, W), labels (N,)).

    Returns:
        The result over the images of all workers.

    Raises:
        FloatingPointError: logits that are not finite, on any worker: argmax would count them as class 0.
        ValueError: no images.
    """
    keep_freed_memory()
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    training = model.training
    model.eval()
    sums = torch.zeros(4, dtype=torch.float64, device=device)  # correct, loss, images, logits not finite
    for images, labels in batches:
        logits, targets = model(images.to(device)), labels.to(device)
        sums[0] += (logits.argmax(1) == targets).sum()
        sums[1] += functional.cross_entropy(logits.float(), targets, reduction="sum")
        sums[2] += len(targets)
        sums[3] += (~torch.isfinite(logits).all(1)).sum()
    model.train(training)
    correct, loss, count, broken = sum_over_workers(sums).tolist()
    if not count:
        raise ValueError("nothing to evaluate: the loader gave no images")
    if broken or not math.isfinite(loss):
        wrong = f"the answers to {int(broken)} are not" if broken else f"their loss is {loss:g}"
        raise FloatingPointError(f"the model is not finite on {int(count)} images: {wrong}")
    return Evaluation(correct / count, loss / count, int(count))
