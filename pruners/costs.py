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


@dataclass(frozen=True)
class CostModel:
    """What a model costs at any allocation: totals, and each weight's size and MACs (by parameter name)."""

    parameters: int
    macs: int
    weights: Mapping[str, int]
    weight_macs: Mapping[str, float]

    def at(self, pruned: Mapping[str, int]) -> Costs:
        """Costs with so many weights pruned in each layer."""
        saved = sum(self.weight_macs[name] * count / self.weights[name] for name, count in pruned.items())
        return Costs(
            self.parameters, self.parameters - sum(pruned.values()), self.macs, self.macs - round(saved)
        )


def cost_model(model: nn.Module, input_size: tuple[int, int, int]) -> CostModel:
    """Count a model once.

    Nothing is computed: the forward runs on the meta device, so any size is counted in a moment.

    Args:
        input_size: (channels, height, width).
    """
    skeleton = copy.deepcopy(model).to("meta").eval()
    counter = FlopCounterMode(display=False)
    # the mathematical form of the attention is what the counter sees through
    with counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        skeleton(torch.empty(1, *input_size, device="meta"))
    by_module = counter.get_flop_counts()
    root = type(skeleton).__name__
    weights = {name: parameter.numel() for name, parameter in skeleton.named_parameters()}
    return CostModel(
        parameters=sum(weights.values()),
        macs=counter.get_total_flops() // 2,
        weights=weights,
        weight_macs={
            name: sum(by_module.get(f"{root}.{name.removesuffix('.weight')}", {}).values()) / 2
            for name in weights
            if name.endswith(".weight")
        },
    )


def count_costs(model: nn.Module, input_size: tuple[int, int, int], pruned: Mapping[str, int]) -> Costs:
    """Parameters and MACs of a model with so many weights pruned in each layer (by parameter name)."""
    return cost_model(model, input_size).at(pruned)
