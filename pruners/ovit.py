"""oViT: correlation-aware second-order pruning (published as CAP, NeurIPS 2023, arXiv 2210.09223)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pruners.allocation import Scope
from pruners.errors import InputError
from pruners.fisher import BlockFisher, to_blocks
from pruners.layers import PrunableLayer
from pruners.obs import Elimination, eliminate
from pruners.order import BlockUpdates, EliminationOrder, LayerOrder

# float64 numbers of H⁻¹ and V that one call of the elimination works on at a time (about 100 MB)
_WORKING_NUMBERS = 6_000_000


@dataclass(frozen=True)
class OViT:
    """Weights fall one at a time inside Fisher blocks, and each fall is followed by the others of its block.

    A weight's loss is the cumulative OBS loss of its block when it falls; one threshold for the model.

    Args:
        block_size: B, consecutive weights treated as correlated (192 for ViTs).
        damp: λ, added to the diagonal of the Fisher; the touchiest parameter of the method.
    """

    block_size: int = 192
    damp: float = 1e-8
    name: str = "ovit"
    scope: Scope = "global"

    def fisher(self, layers: Sequence[PrunableLayer]) -> BlockFisher:
        return BlockFisher(layers, block_size=self.block_size, damp=self.damp)

    def order(
        self,
        weights: Mapping[str, Tensor],
        layers: Sequence[PrunableLayer],
        masks: Mapping[str, Tensor],
        fisher: BlockFisher | None,
    ) -> EliminationOrder:
        if fisher is None:
            raise InputError("fisher", None, "oViT needs a Fisher with gradients")
        fisher.flush()
        return EliminationOrder(
            {
                layer.name: _layer_order(weights[layer.name], masks[layer.name], fisher, layer.name)
                for layer in layers
            }
        )


def _layer_order(weight: Tensor, mask: Tensor, fisher: BlockFisher, name: str) -> LayerOrder:
    size = fisher.block_size(name)
    numel = weight.numel()
    kept = (mask & (weight != 0)).reshape(-1)  # a zero weight falls first, at no loss
    blocks = to_blocks(weight.detach().reshape(-1).double(), size)
    alive = to_blocks(kept, size)
    together = max(1, _WORKING_NUMBERS // (2 * size * size))
    parts: list[Elimination] = []
    for start in range(0, len(blocks), together):
        chosen = slice(start, start + together)
        inverse = fisher.inverse(name, chosen, alive[chosen])
        part = eliminate(blocks[chosen], inverse, alive[chosen])
        parts.append(Elimination(part.order, part.losses, part.columns.float(), part.coefficients.float()))
    order = torch.cat([part.order for part in parts])
    losses = torch.cat([part.losses for part in parts])
    offsets = torch.arange(len(blocks), device=weight.device).unsqueeze(1) * size

    # step-major, so that the stable sort keeps each block's own order among equal losses
    flat_losses, ranking = torch.sort(losses.T.reshape(-1), stable=True)
    remaining = int(kept.sum())
    fallen = (order + offsets).T.reshape(-1)[ranking[:remaining]]
    pruned = ~mask.reshape(-1)
    zeros = torch.cat([pruned.nonzero(), (~kept & ~pruned).nonzero()]).reshape(-1)
    return LayerOrder(
        indices=torch.cat([zeros, fallen]).int(),
        losses=torch.cat([flat_losses.new_zeros(numel - remaining), flat_losses[:remaining]]),
        zeros=numel - remaining,
        updates=BlockUpdates(
            torch.cat([part.columns for part in parts]),
            torch.cat([part.coefficients for part in parts]),
        ),
    )
