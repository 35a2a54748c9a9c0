"""Memory of a Fisher, and how layers are grouped so that each group fits into a budget."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch

from pruners.arithmetic import ceil_div
from pruners.elimination.fisher import HALVED, RESIDENT
from pruners.errors import InputError
from pruners.model.layers import PrunableLayer

_SHARE_OF_FREE = 0.6


def free_bytes(device: torch.device) -> int:
    """The default budget for a Fisher on a device: 60 % of its free memory, in bytes."""
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


def give_back_freed() -> None:
    """Return freed memory to the system (``malloc_trim``); the C library would keep half of a large order."""
    trim = _malloc_trim()
    if trim is not None:
        trim(0)


@functools.cache
def _malloc_trim() -> Callable[[int], int] | None:
    """glibc's ``malloc_trim``; ``None`` in the process of another C library."""
    try:
        return ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):
        return None


def fisher_bytes(layer: PrunableLayer, block_size: int, number: int = 4) -> int:
    """Estimate the largest amount of memory that the Fisher of a layer takes at any time.

    Args:
        layer: the layer.
        block_size: B, weights of a block.
        number: bytes of one number of the sums, 4 or 8.

    Returns:
        Bytes.
    """
    blocks = ceil_div(layer.numel, block_size)
    # Small blocks keep their sums in full, and the columns of the elimination take as much again.
    share = RESIDENT if block_size >= HALVED else 2.0
    return int(share * blocks * block_size**2 * number)


def layer_groups(
    layers: Sequence[PrunableLayer], sizes: Mapping[str, int], budget: int, number: int = 4
) -> list[list[PrunableLayer]]:
    """Divide layers into consecutive groups whose Fishers fit into a budget.

    Args:
        layers: the layers.
        sizes: B, weights of a block, for each layer by parameter name.
        budget: bytes for the Fisher of a group.
        number: bytes of one number of the sums, 4 or 8.

    Returns:
        The groups, with the layers in their order.

    Raises:
        InputError: the Fisher of a single layer does not fit.
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
