"""A flat layer as Fisher blocks."""

from __future__ import annotations

import torch
from torch import Tensor


def to_blocks(flat: Tensor, size: int) -> Tensor:
    """Cut (…, d) into (…, n, size); the last block is padded with zeros."""
    blocks = -(-flat.shape[-1] // size)
    short = blocks * size - flat.shape[-1]
    padded = torch.nn.functional.pad(flat, (0, short)) if short else flat
    return padded.reshape(*flat.shape[:-1], blocks, size)
