"""Top-1 and loss over a loader, shared out over the workers."""

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
    """``top1`` in 0…1, the mean cross-entropy, and the number of images, over all workers."""

    top1: float
    loss: float
    images: int

    @property
    def score(self) -> float:
        """Orders by top-1 and, where that is equal, by loss (which counts for less than one image)."""
        return self.top1 - min(self.loss, _LOSS_CAP) / (_LOSS_CAP * 2 * self.images)

    @classmethod
    def over(cls, parts: Sequence[Evaluation]) -> Evaluation:
        """Of several sets of images together."""
        images = sum(part.images for part in parts)
        top1 = sum(part.top1 * part.images for part in parts) / images
        return cls(top1, sum(part.loss * part.images for part in parts) / images, images)


@torch.no_grad()
def evaluate(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]]) -> Evaluation:
    """Evaluate in eval mode; the model's mode is restored. What has no parameters is run on the CPU.

    Raises:
        FloatingPointError: answers that are not finite, on every worker (class 0 would be the largest).
        ValueError: no images.
    """
    keep_freed_memory()
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    training = model.training
    model.eval()
    sums = torch.zeros(4, dtype=torch.float64, device=device)  # correct, loss, images, answers not finite
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
