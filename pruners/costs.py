"""Parameters and multiply-accumulates of a model, dense and sparse-counted (a zero weight costs nothing)."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import asdict, dataclass

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode


@dataclass(frozen=True)
class Costs:
    """Counts for one image; ``macs`` include the attention products."""

    parameters: int
    parameters_sparse: int
    macs: int
    macs_sparse: int

    def as_dict(self) -> dict[str, int]:
        return asdict(self)


def count_costs(model: nn.Module, input_size: tuple[int, int, int], pruned: Mapping[str, int]) -> Costs:
    """Count a model's parameters and MACs.

    Nothing is computed: the forward runs on the meta device, so any size is counted in a moment.

    Args:
        input_size: (channels, height, width).
        pruned: pruned weights of each layer, by parameter name.
    """
    skeleton = copy.deepcopy(model).to("meta").eval()
    parameters = {name: parameter.numel() for name, parameter in skeleton.named_parameters()}
    counter = FlopCounterMode(display=False)
    # the mathematical form of the attention is what the counter sees through
    with counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        skeleton(torch.empty(1, *input_size, device="meta"))
    macs = counter.get_total_flops() // 2
    by_module = counter.get_flop_counts()
    root = type(skeleton).__name__
    saved = 0.0
    for name, count in pruned.items():
        layer = sum(by_module.get(f"{root}.{name.removesuffix('.weight')}", {}).values()) / 2
        saved += layer * count / parameters[name]
    total = sum(parameters.values())
    return Costs(total, total - sum(pruned.values()), macs, macs - round(saved))
