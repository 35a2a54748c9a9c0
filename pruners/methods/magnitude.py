"""Pruning by magnitude: the smallest weights fall first; uniform, global, and LAMP."""

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
    """A data-free method: each layer's weights fall in the order of their magnitude.

    Such methods differ in what a fall costs (:meth:`score`), and so in how layers compare.
    """

    pattern: str = "unstructured"
    scope: Scope = "layer"
    name: str = ""
    form: Pattern = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "form", Pattern.parse(self.pattern))

    @abstractmethod
    def score(self, magnitudes: Tensor) -> Tensor:
        """Losses (d,), ascending, of one layer's weights from their magnitudes (d,), ascending."""

    @property
    def gradients(self) -> int:
        return 0

    def fisher(self, layers: Sequence[PrunableLayer]) -> BlockFisher | None:
        return None

    def order(
        self,
        weights: Mapping[str, Tensor],
        layers: Sequence[PrunableLayer],
        masks: Mapping[str, Tensor],
        fisher: BlockFisher | None,
    ) -> EliminationOrder:
        return EliminationOrder(
            {layer.name: self._layer(layer.name, weights[layer.name], masks[layer.name]) for layer in layers}
        )

    def _layer(self, name: str, weight: Tensor, mask: Tensor) -> LayerOrder:
        form = self.form
        magnitudes = form.flat(weight.detach()).float().abs()
        kept = form.flat(mask)
        alive = kept & (magnitudes != 0)
        form.check_zeros(name, alive)
        magnitudes.masked_fill_(~kept, -1.0)  # what is pruned comes first, then other zeros
        if form.whole:
            grouped = magnitudes.reshape(-1, form.group)
            magnitudes = torch.where(grouped.amax(1) < 0, -1.0, grouped.clamp_min(0.0).square().sum(1).sqrt())
        magnitudes, positions = torch.sort(magnitudes, stable=True)
        losses = self.score(magnitudes.clamp_min_(0.0))
        if form.whole:
            members = torch.arange(form.group, device=positions.device)
            positions = (positions.unsqueeze(1) * form.group + members).reshape(-1)
            losses = losses.repeat_interleave(form.group)
        elif form.structured:
            free = form.free(form.flat(weight.detach()).float().abs(), alive)[positions]
            positions, losses = positions[free], losses[free]
        return LayerOrder(positions.int(), losses, len(kept) - int(alive.sum()), pattern=form)


@dataclass(frozen=True)
class Magnitude(RankedByMagnitude):
    """Smallest |w| first; the loss of a weight is w².

    Uniform (every layer at the same sparsity) by its own scope ``layer``, global with ``global``.
    """

    name: str = "magnitude"

    def score(self, magnitudes: Tensor) -> Tensor:
        return magnitudes.square()


@dataclass(frozen=True)
class GlobalMagnitude(Magnitude):
    """Smallest |w| first over the whole model."""

    scope: Scope = "global"
    name: str = "magnitude_global"
