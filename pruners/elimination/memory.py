"""How much memory a Fisher takes, and in how many groups of layers it fits into a budget."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from pruners.elimination.fisher import HALVED, RESIDENT
from pruners.errors import InputError
from pruners.model.layers import PrunableLayer

_SHARE_OF_FREE = 0.6


def free_bytes(device: torch.device) -> int:
    """What may be taken on a device: the share of its free memory that is ours by default."""
    if device.type == "cuda":
        return int(_SHARE_OF_FREE * torch.cuda.mem_get_info(device)[0])
    lines = Path("/proc/meminfo").read_text().splitlines() if Path("/proc/meminfo").is_file() else []
    available = next(
        (int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable")), 1 << 33
    )
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if limit.is_file() and used.is_file() and limit.read_text().strip().isdigit():
        available = min(available, int(limit.read_text()) - int(used.read_text()))
    return int(_SHARE_OF_FREE * available)


def fisher_bytes(layer: PrunableLayer, block_size: int, number: int = 4) -> int:
    """The most that a layer's Fisher takes on its way (``number``: bytes of each of its numbers)."""
    blocks = -(-layer.numel // block_size)
    # small blocks: sums in full, and as many numbers again in the columns of the elimination
    share = RESIDENT if block_size >= HALVED else 2.0
    return int(share * blocks * block_size**2 * number)


def layer_groups(
    layers: Sequence[PrunableLayer], sizes: Mapping[str, int], budget: int, number: int = 4
) -> list[list[PrunableLayer]]:
    """The layers, in their order, in groups of which each fits into ``budget`` bytes.

    Raises:
        InputError: a layer that does not fit by itself.
    """
    groups: list[list[PrunableLayer]] = []
    left = 0
    for layer in layers:
        need = fisher_bytes(layer, sizes[layer.name], number)
        if need > budget:
            raise InputError(
                "memory",
                budget,
                f"bytes are not enough for the Fisher of {layer.name} alone, which takes {need}; "
                "give more, or a smaller block_size",
            )
        if need > left:
            groups.append([])
            left = budget
        groups[-1].append(layer)
        left -= need
    return groups
