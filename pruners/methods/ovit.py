"""oViT: correlation-aware second-order pruning (Kuznedelev et al., published as CAP, NeurIPS 2023).

The paper is arXiv 2210.09223. How its symbols are called here stands beside the maths: the Fisher in
:mod:`pruners.elimination.fisher`, Algorithm 1 in :mod:`pruners.elimination.obs`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

from pruners.allocation.sharing import Scope
from pruners.elimination.constraints import Constraint, GroupLimits, WholeGroups
from pruners.elimination.obs import Elimination, eliminate, eliminate_sums
from pruners.elimination.order import LayerOrder
from pruners.methods.dimap import Dimap
from pruners.methods.second_order import BlockMerge, Chunk, SecondOrder, State, Task, chunks, room_of
from pruners.model.layers import PrunableLayer
from pruners.model.sparsity_pattern import Pattern


@dataclass(frozen=True)
class OViT(SecondOrder):
    """Eliminates weights one at a time inside Fisher blocks, and updates the others after each.

    The loss of a weight is the cumulative OBS loss of its block when the weight is eliminated. There is one
    threshold for the whole model.
    """

    name: str = "ovit"

    def extend(self, task: Task, known: LayerOrder | None, steps: int) -> LayerOrder:
        """Compute further steps of the order of a layer (see :meth:`SecondOrder.extend`)."""
        known = task.initial_order() if known is None else known
        state = State.after(task, known)
        merge = BlockMerge(task, known, state, steps)
        for chunk in chunks(task, state.weight, state.alive):
            constraint, most = _constraint(task.pattern, chunk, state.alive[chunk.part])
            elimination = _eliminated(chunk, constraint, min(steps, most), state.losses[chunk.part])
            merge.add(chunk, elimination)
        return merge.order()


@dataclass(frozen=True)
class OViTFast(OViT):
    """oViT with the paper's fast settings: m = 256 gradients, and λ = 1e-2 of the mean diagonal.

    Only the settings are those of the fast variant: every block still has a Fisher of its own.
    """

    damp: float = 1e-2
    relative: bool = True
    gradients: int = 256
    name: str = "ovit_fast"


@dataclass(frozen=True)
class DimapOViT(OViT):
    """DIMAP decides how many weights each layer loses, module by module; oViT decides which."""

    scope: Scope = "module"
    name: str = "dimap+ovit"

    def with_scores(self, order: LayerOrder, task: Task) -> LayerOrder:
        """The order with the DIMAP scores of the layer, by which layers are compared."""
        shape = (1, task.layer.numel)
        flat = PrunableLayer(task.layer.name, task.layer.module, task.layer.stage, shape)
        by_dimap = Dimap().order(
            {flat.name: task.weight.reshape(shape)}, [flat], {flat.name: ~task.pruned.reshape(shape)}, None
        )
        return replace(order, scores=by_dimap[flat.name].losses[: len(order.losses)])


def _eliminated(chunk: Chunk, constraint: Constraint | None, steps: int, losses: Tensor) -> Elimination:
    """The elimination of a chunk, where possible without an inverse of all its blocks."""
    sums = chunk.sums if constraint is None else None
    if sums is not None:
        done = eliminate_sums(chunk.weights, sums, chunk.alive, steps=steps, losses=losses)
        if done is not None:
            return done
    return eliminate(
        chunk.weights, chunk.inverse, chunk.alive, constraint=constraint, steps=steps, losses=losses
    )


def _constraint(pattern: Pattern, chunk: Chunk, alive: Tensor) -> tuple[Constraint | None, int]:
    """The constraint of a pattern, and how many steps a block can take under it at most."""
    if not pattern.structured:
        return None, chunk.slots.shape[1]
    if pattern.whole:
        return WholeGroups(pattern.unit), chunk.slots.shape[1]
    room = room_of(pattern, alive)
    return GroupLimits(chunk.slots // pattern.group, room), int(room.sum(1).max())
