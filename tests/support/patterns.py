"""Layers and zeros by sparsity patterns."""

from __future__ import annotations

import torch
from helpers import CONVOLUTIONS
from torch import Tensor, nn

from pruners import PrunableLayer, find_layers


def layers_of(model: nn.Module) -> list[PrunableLayer]:
    return find_layers(model, CONVOLUTIONS if isinstance(model, nn.Sequential) else None)


def zeros_in_groups(zero: Tensor, size: int) -> Tensor:
    """How many zeros there are among each ``size`` inputs in a row, for each output and kernel position."""
    return torch.stack([zero[:, i : i + size].sum(1) for i in range(0, zero.shape[1], size)], 1)
