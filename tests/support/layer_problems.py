"""Single layers with correlated gradients, for the methods that follow them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from helpers import lone_layer
from torch import Tensor

from pruners import PrunableLayer
from pruners.elimination.order import LayerOrder
from pruners.methods.second_order import SecondOrder

DAMP = 0.05


@dataclass(frozen=True)
class Problem:
    """A layer, its weights (1, d), its mask, and gradients (k, 1, d)."""

    layer: PrunableLayer
    weight: Tensor
    mask: Tensor
    gradients: Tensor

    @property
    def alive(self) -> Tensor:
        """(d,) what is neither pruned nor zero."""
        return (self.mask & (self.weight != 0)).reshape(-1)

    @property
    def flat(self) -> Tensor:
        """(d,) the weights that are alive, in float64."""
        return torch.where(self.mask, self.weight, 0.0).reshape(-1).double()

    def fisher(self) -> Tensor:
        """The whole layer's (d, d), damped, in float64."""
        rows = self.gradients.reshape(len(self.gradients), -1).double()
        return rows.T @ rows / len(rows) + DAMP * torch.eye(rows.shape[1], dtype=torch.float64)

    def ordered(self, pruner: SecondOrder) -> LayerOrder:
        name = self.layer.name
        fisher = pruner.fisher([self.layer])
        for gradient in self.gradients:
            fisher.add({name: gradient})
        return pruner.order({name: self.weight}, [self.layer], {name: self.mask}, fisher)[name]


def problem(seed: int, numel: int, alive_share: float, *, unit: int = 1, scale: float = 1.0) -> Problem:
    random = torch.Generator().manual_seed(seed)
    layer = lone_layer(1, numel)
    weight = torch.randn(layer.shape, generator=random)
    mask = (torch.rand(1, numel // unit, generator=random) < alive_share).repeat_interleave(unit, 1)
    common = torch.randn(20, 1, 1, generator=random)
    gradients = torch.randn(20, 1, numel, generator=random) + common
    return Problem(layer, weight, mask, scale * gradients)
