"""Find weights that are not finite: they are never saved, and never loaded."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


@torch.no_grad()
def not_finite(tensors: Mapping[str, Tensor]) -> list[str]:
    """Names of the tensors that have NaN or an infinite number, in their order.

    Synchronises with the device once. Tensors of one element may be infinite: some models store a limit that
    is switched off so.
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
    """Format the names of tensors that are not finite: the first one, and how many more there are."""
    more = f", nor are {len(names) - 1} other tensors" if len(names) > 1 else ""
    return f"{names[0]} is not finite{more}"


def check_finite(tensors: Mapping[str, Tensor], what: str) -> None:
    """Check that tensors are finite.

    Args:
        tensors: by their names.
        what: begins the error message.

    Raises:
        FloatingPointError: a tensor has NaN or an infinite number; names it.
    """
    names = not_finite(tensors)
    if names:
        raise FloatingPointError(f"{what}: {describe(names)}")
