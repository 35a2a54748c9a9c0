"""Magnitude pruning: the smallest weights fall first."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pruners.allocation import Scope
from pruners.fisher import BlockFisher
from pruners.layers import PrunableLayer
from pruners.order import EliminationOrder, LayerOrder


def ascending(weight: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """(magnitudes ascending, their flat positions): what is pruned comes first, as 0, then other zeros."""
    magnitudes = weight.detach().float().abs().masked_fill(~mask, -1.0)
    magnitudes, positions = torch.sort(magnitudes.reshape(-1), stable=True)
    return magnitudes.clamp_min_(0.0), positions.int()


class RankedByMagnitude(ABC):
    """A data-free method: each layer's weights fall in the order of their magnitude.

    Such methods differ in what a fall costs (:meth:`score`), and so in how layers compare.
    """

    @abstractmethod
    def score(self, magnitudes: Tensor) -> Tensor:
        """Losses (d,), ascending, of one layer's weights from their magnitudes (d,), ascending."""

    def fisher(self, layers: Sequence[PrunableLayer]) -> BlockFisher | None:
        return None

    def order(
        self,
        weights: Mapping[str, Tensor],
        layers: Sequence[PrunableLayer],
        masks: Mapping[str, Tensor],
        fisher: BlockFisher | None,
    ) -> EliminationOrder:
        orders = EliminationOrder()
        for layer in layers:
            magnitudes, positions = ascending(weights[layer.name], masks[layer.name])
            orders[layer.name] = LayerOrder(positions, self.score(magnitudes))
        return orders


@dataclass(frozen=True)
class Magnitude(RankedByMagnitude):
    """Smallest |w| first; the loss of a weight is w².

    Uniform (every layer at the same sparsity) by its own scope ``layer``, global with ``global``.
    """

    name: str = "magnitude"
    scope: Scope = "layer"

    def score(self, magnitudes: Tensor) -> Tensor:
        return magnitudes.square()
