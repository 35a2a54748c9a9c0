"""What is not finite: weights that nobody may save, keep, or go on from."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


@torch.no_grad()
def not_finite(tensors: Mapping[str, Tensor]) -> list[str]:
    """Names of the tensors that hold NaN or an infinite number, in their order.

    The device is waited for once. A single number may be infinite: models keep limits that bind nothing.
    """
    numbers = {
        name: tensor.detach()
        for name, tensor in tensors.items()
        if tensor.is_floating_point() and tensor.element_size() > 1 and tensor.numel()
    }
    sound = [
        (torch.isfinite(tensor) if tensor.dim() else ~torch.isnan(tensor)).all()
        for tensor in numbers.values()
    ]
    if not sound:
        return []
    return [name for name, right in zip(numbers, torch.stack(sound).tolist(), strict=True) if not right]


def describe(names: list[str]) -> str:
    """The first of the tensors that are not finite, and how many there are."""
    more = f", nor are {len(names) - 1} other tensors" if len(names) > 1 else ""
    return f"{names[0]} is not finite{more}"


def check_finite(tensors: Mapping[str, Tensor], what: str) -> None:
    """Raises:
    FloatingPointError: NaN or an infinite number in one of them, by its name.
    """
    names = not_finite(tensors)
    if names:
        raise FloatingPointError(f"{what}: {describe(names)}")
