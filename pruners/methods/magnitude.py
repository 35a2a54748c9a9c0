"""Pruning by magnitude: the smallest weights of a layer are pruned first (uniform, global)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from pruners.allocation.sharing import Scope
from pruners.elimination.fisher import BlockFisher
from pruners.elimination.order import EliminationOrder, LayerOrder
from pruners.model.layers import PrunableLayer
from pruners.model.sparsity_pattern import Pattern


@dataclass(frozen=True)
class RankedByMagnitude(ABC):
    """Base class of data-free methods, which prune the weights of a layer in the order of their magnitude.

    Such methods differ in the loss of a weight (:meth:`score`), and so in how layers are compared.

    Args:
        pattern: ``unstructured``, ``2:4``, ``4:8``, ``1x4``.
        scope: which layers share one threshold.
        name: of the method.

    Raises:
        InputError: an unknown pattern.
    """

    pattern: str = "unstructured"
    scope: Scope = "layer"
    name: str = ""
    sparsity_pattern: Pattern = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "sparsity_pattern", Pattern.parse(self.pattern))

    @abstractmethod
    def score(self, magnitudes: Tensor) -> Tensor:
        """The losses (d,) of a layer's weights, ascending, from their magnitudes (d,), ascending."""

    @property
    def gradients(self) -> int:
        """0: these methods need no gradients."""
        return 0

    def fisher(self, layers: Sequence[PrunableLayer]) -> BlockFisher | None:
        """``None``: these methods need no Fisher."""
        return None

    def order(
        self,
        weights: Mapping[str, Tensor],
        layers: Sequence[PrunableLayer],
        masks: Mapping[str, Tensor],
        fisher: BlockFisher | None,
    ) -> EliminationOrder:
        """Put the weights of each layer in the order of their magnitude.

        Args:
            weights: current weights, by parameter name.
            layers: the layers to order.
            masks: by parameter name; pruned weights (``False``) come first, at no loss.
            fisher: is not used.

        Returns:
            The order of each layer.

        Raises:
            InputError: the zeros of a layer do not keep a pattern of whole groups.
        """
        return EliminationOrder(
            {layer.name: self._layer(layer.name, weights[layer.name], masks[layer.name]) for layer in layers}
        )

    def _layer(self, name: str, weight: Tensor, mask: Tensor) -> LayerOrder:
        pattern = self.sparsity_pattern
        magnitudes = pattern.flat(weight.detach()).float().abs()
        kept = pattern.flat(mask)
        alive = kept & (magnitudes != 0)
        pattern.check_zeros(name, alive)
        magnitudes.masked_fill_(~kept, -1.0)  # pruned weights come first, then other zeros
        if pattern.whole:
            grouped = magnitudes.reshape(-1, pattern.group)
            magnitudes = torch.where(grouped.amax(1) < 0, -1.0, grouped.clamp_min(0.0).square().sum(1).sqrt())
        magnitudes, positions = torch.sort(magnitudes, stable=True)
        losses = self.score(magnitudes.clamp_min_(0.0))
        if pattern.whole:
            members = torch.arange(pattern.group, device=positions.device)
            positions = (positions.unsqueeze(1) * pattern.group + members).reshape(-1)
            losses = losses.repeat_interleave(pattern.group)
        elif pattern.structured:
            free = pattern.free(pattern.flat(weight.detach()).float().abs(), alive)[positions]
            positions, losses = positions[free], losses[free]
        return LayerOrder(positions.int(), losses, len(kept) - int(alive.sum()), pattern=pattern)


@dataclass(frozen=True)
class Magnitude(RankedByMagnitude):
    """Prunes the smallest |w| of each layer; the loss of a weight is w².

    With its own scope ``layer`` every layer gets the same sparsity.
    """

    name: str = "magnitude"

    def score(self, magnitudes: Tensor) -> Tensor:
        """w² of each weight."""
        return magnitudes.square()


@dataclass(frozen=True)
class GlobalMagnitude(Magnitude):
    """Prunes the smallest |w| of the whole model."""

    scope: Scope = "global"
    name: str = "magnitude_global"
