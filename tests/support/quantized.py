"""Tiny models with zeros, for what makes them INT8."""

from __future__ import annotations

from typing import Any

import torch
from image_tables import tiny

from pruners.model.layers import find_layers
from pruners.model.masks import MaskSet

SIZE = (3, 16, 16)


def pruned(architecture: str, share: float = 0.7) -> tuple[torch.nn.Module, dict[str, Any], MaskSet]:
    """A tiny model with zeros in its prunable layers."""
    model, arguments = tiny(architecture)
    layers = find_layers(model)
    random = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for layer in layers:
            weight = model.get_parameter(layer.name)
            weight.masked_fill_(torch.rand(weight.shape, generator=random) < share, 0.0)
    return model, arguments, MaskSet.from_zeros(model, layers)
