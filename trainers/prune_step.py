"""One pruning step over data-parallel workers: each orders its share of the layers, all agree on the result.

Workers take different gradients, receive the Fisher blocks of their own layers only, and eliminate them;
losses and results are then shared. The maths itself (``pruners``) knows nothing of workers.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from pruners.allocation import Allocation, Scope, allocate
from pruners.base import Pruner
from pruners.fisher import BlockFisher
from pruners.gradients import batch_gradients
from pruners.layers import PrunableLayer
from pruners.masks import MaskSet
from pruners.order import EliminationOrder
from trainers import distributed


@dataclass(frozen=True)
class Share:
    """A threshold for every group of ``scope``, each layer between floor and ceiling."""

    scope: Scope
    floor: float
    ceiling: float


def owners(layers: Sequence[PrunableLayer], world: int) -> dict[str, int]:
    """Which worker orders which layer: the largest first, each to the worker with the least so far."""
    load = [0] * world
    found: dict[str, int] = {}
    for layer in sorted(layers, key=lambda layer: (-layer.numel, layer.name)):
        owner = load.index(min(load))
        found[layer.name] = owner
        load[owner] += layer.numel
    return found


def order_share(
    model: nn.Module,
    layers: Sequence[PrunableLayer],
    masks: MaskSet,
    pruner: Pruner,
    batches: Iterable[tuple[Tensor, Tensor]],
) -> EliminationOrder:
    """The order of this worker's share of the layers, from the gradients of all workers.

    Args:
        batches: this worker's own batches; every worker must have the same number, give or take one.
    """
    owner = owners(layers, distributed.world_size())
    weights = {name: weight.detach() for name, weight in model.named_parameters()}
    fisher = pruner.fisher(layers)
    if fisher is not None:
        for gradients in batch_gradients(model, layers, masks, batches, functional.cross_entropy):
            fisher.add(gradients)
        _gather_fisher(fisher, layers, owner, next(model.parameters()).device)
    mine = [layer for layer in layers if owner[layer.name] == distributed.rank()]
    return pruner.order(weights, mine, masks, fisher)


def prune_step(
    model: nn.Module,
    layers: Sequence[PrunableLayer],
    masks: MaskSet,
    pruner: Pruner,
    batches: Iterable[tuple[Tensor, Tensor]],
    *,
    total: int,
    target: Allocation | Share,
) -> MaskSet:
    """Prune ``model`` in place to ``total`` zeros on every worker; returns the new masks.

    Args:
        target: pruned weights of each layer, or how thresholds are shared.

    Raises:
        RuntimeError: workers that do not end with the same masks.
    """
    owner = owners(layers, distributed.world_size())
    order = order_share(model, layers, masks, pruner, batches)
    if isinstance(target, Share):
        losses = _gather_losses(order, layers, owner, next(model.parameters()).device)
        target = allocate(
            losses,
            layers,
            total,
            target.scope,
            floor=target.floor,
            ceiling=target.ceiling,
            pruned=masks.pruned(),
        )
    parameters = dict(model.named_parameters())
    new: dict[str, Tensor] = {}
    for layer in layers:
        weight = parameters[layer.name].detach()
        mask = torch.empty(layer.shape, dtype=torch.bool, device=weight.device)
        if layer.name in order:
            count = target[layer.name]
            weight.copy_(order[layer.name].weight(weight, count))
            mask = order[layer.name].mask(layer.shape, count)
        distributed.share_from(weight, owner[layer.name])
        new[layer.name] = distributed.bool_from(mask, owner[layer.name])
    result = MaskSet(new)
    if not distributed.agree(result.fingerprint()):
        raise RuntimeError("the workers ended a pruning step with different masks")
    return result


def _gather_fisher(
    fisher: BlockFisher, layers: Sequence[PrunableLayer], owner: Mapping[str, int], device: torch.device
) -> None:
    """Sum each layer's Fisher blocks on its owner, and drop them elsewhere."""
    fisher.flush()
    for layer in layers:
        distributed.reduce_to(fisher.sums[layer.name], owner[layer.name])
        if owner[layer.name] != distributed.rank():
            del fisher.sums[layer.name]
    count = torch.tensor(fisher.count, device=device)
    fisher.count = int(distributed.sum_over_workers(count))


def _gather_losses(
    order: EliminationOrder,
    layers: Sequence[PrunableLayer],
    owner: Mapping[str, int],
    device: torch.device,
) -> dict[str, Tensor]:
    losses = {}
    for layer in layers:
        if layer.name in order:
            mine = order[layer.name].losses.double().contiguous()
        else:
            mine = torch.empty(layer.numel, dtype=torch.float64, device=device)
        losses[layer.name] = distributed.share_from(mine, owner[layer.name])
    return losses
