"""The protocol that every pruning method keeps, and the one-shot use of it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from pruners.allocation import Allocation, Scope, allocate, budget
from pruners.errors import InputError
from pruners.fisher import BlockFisher
from pruners.gradients import Batch, Loss, batch_gradients
from pruners.layers import PrunableLayer, find_layers
from pruners.masks import MaskSet
from pruners.order import EliminationOrder


class Pruner(Protocol):
    """A pruning method: it orders the weights; allocations and patterns then say how far each layer goes.

    ``scope`` is the method's own allocation: what shares one threshold.
    """

    @property
    def name(self) -> str: ...

    @property
    def scope(self) -> Scope: ...

    def fisher(self, layers: Sequence[PrunableLayer]) -> BlockFisher | None:
        """What gradients are to be added to before :meth:`order`; ``None`` for a data-free method."""

    def order(
        self,
        weights: Mapping[str, Tensor],
        layers: Sequence[PrunableLayer],
        masks: Mapping[str, Tensor],
        fisher: BlockFisher | None,
    ) -> EliminationOrder:
        """The order in which the weights of ``layers`` fall; ``layers`` may be a share of the model.

        Args:
            weights: current weights, by parameter name.
            masks: weights already pruned are ``False``: they come first, at no loss.
            fisher: what :meth:`fisher` gave, with gradients.
        """


@dataclass(frozen=True)
class PruneReport:
    """What :func:`prune` did: pruned weights of each layer, the masks, and the sparsity reached."""

    method: str
    allocation: Allocation
    masks: MaskSet
    sparsity: float


def prune(
    model: nn.Module,
    method: str | Pruner = "dimap",
    sparsity: float = 0.75,
    *,
    batches: Iterable[Batch] | None = None,
    loss: Loss = nn.functional.cross_entropy,
    layers: Sequence[PrunableLayer] | None = None,
    scope: Scope | None = None,
    gradients: int = 256,
) -> PruneReport:
    """Prune ``model`` in one shot, in place; after an error it is as it was.

    Args:
        method: a name (:data:`pruners.METHODS`) or a pruner of one's own.
        sparsity: pruned share of the prunable weights, 0 to 1.
        batches: (images, labels) for methods that follow gradients (``ovit``).
        layers: default all prunable layers of a timm vision transformer (:func:`find_layers`).
        scope: what shares one threshold; default the method's own.
        gradients: how many batches to take at most.

    Raises:
        InputError: an unknown method or scope, a sparsity outside 0…1 or below the model's own, missing
            batches, NaN in the weights or gradients.
    """
    from pruners.methods import create_pruner

    pruner = create_pruner(method) if isinstance(method, str) else method
    chosen = find_layers(model) if layers is None else list(layers)
    total = budget(chosen, sparsity)
    parameters = dict(model.named_parameters())
    weights: dict[str, Tensor] = {layer.name: parameters[layer.name].detach() for layer in chosen}
    for name, weight in weights.items():
        if not torch.isfinite(weight).all():
            raise InputError("weights", name, "has NaN or Inf")
    masks = MaskSet.from_zeros(model, chosen)
    if sum(masks.pruned().values()) > total:
        raise InputError("sparsity", sparsity, f"the model is sparser already ({masks.sparsity:.4f})")
    fisher = pruner.fisher(chosen)
    if fisher is not None:
        if batches is None:
            raise InputError("batches", None, f"{pruner.name} needs batches of (images, labels)")
        for gradient in batch_gradients(model, chosen, masks, batches, loss, limit=gradients):
            fisher.add(gradient)
    order = pruner.order(weights, chosen, masks, fisher)
    allocation = allocate(order.losses, chosen, total, scope or pruner.scope, pruned=masks.pruned())
    new, kept = order.weights_at(weights, allocation)
    with torch.no_grad():
        for name, weight in new.items():
            parameters[name].copy_(weight)
    return PruneReport(pruner.name, allocation, kept, kept.sparsity)
