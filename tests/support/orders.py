"""Orders that several test files read: of a model a fifth of which is pruned already, one for each method."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from functools import lru_cache

import torch
from helpers import PRUNERS, batches, tiny_vit
from torch import Tensor, nn

from pruners import EliminationOrder, MaskSet, PrunableLayer, Pruner, find_layers, prune
from pruners.elimination.fisher import BlockFisher
from pruners.elimination.gradients import gradients


@dataclass(frozen=True)
class Ordered:
    """A model that nobody changes, and one order of its weights."""

    model: nn.Module
    layers: list[PrunableLayer]
    weights: dict[str, Tensor]
    masks: MaskSet
    pruner: Pruner
    fisher: BlockFisher | None
    order: EliminationOrder

    def pruned(self, sparsity: float, **options: object) -> tuple[nn.Module, MaskSet, dict[str, int]]:
        """A copy of the model pruned anew, its masks and allocation."""
        model = copy.deepcopy(self.model)
        report = prune(model, self.pruner, sparsity, batches=batches(), **options)
        return model, report.masks, report.allocation


@lru_cache
def ordered(method: str) -> Ordered:
    model = tiny_vit()
    layers = find_layers(model)
    prune(model, "magnitude", 0.2, scope="global")
    pruner = PRUNERS[method]()
    weights = {layer.name: model.get_parameter(layer.name).detach() for layer in layers}
    masks = MaskSet.from_zeros(model, layers)
    fisher = pruner.fisher(layers)
    if fisher is not None:
        for chunk in gradients(model, layers, masks, batches(), nn.functional.cross_entropy):
            fisher.add_many(chunk)
        fisher.flush()
    return Ordered(
        model, layers, weights, masks, pruner, fisher, pruner.order(weights, layers, masks, fisher)
    )


def assert_same(order: EliminationOrder, other: EliminationOrder, *, updates: bool = True) -> None:
    """The same in every bit, in the form in which orders are stored."""
    assert set(order) == set(other)
    for name, left in order.items():
        right = other[name]
        assert torch.equal(left.indices, right.indices)
        assert torch.equal(left.losses, right.losses)
        assert (left.scores is None) == (right.scores is None)
        if left.scores is not None and right.scores is not None:
            assert torch.equal(left.scores, right.scores)
        assert (left.zeros, left.block_size, left.pattern) == (right.zeros, right.block_size, right.pattern)
        assert len(right.updates) == (len(left.updates) if updates else 0)
        for stretch, again in zip(left.updates, right.updates, strict=False):
            assert torch.equal(stretch.rounded().columns, again.rounded().columns)
            assert torch.equal(stretch.rounded().coefficients, again.rounded().coefficients)
            assert torch.equal(stretch.slots, again.slots)


def assert_close_updates(
    weights: dict[str, Tensor], other: dict[str, Tensor], before: dict[str, Tensor]
) -> None:
    """Weights whose updates are the same to a thousandth, taken over each layer."""
    for name, weight in weights.items():
        update = torch.linalg.vector_norm((weight - before[name]).double())
        assert torch.linalg.vector_norm((weight - other[name]).double()) <= 1e-3 * update
        assert torch.equal(weight != 0, other[name] != 0)
