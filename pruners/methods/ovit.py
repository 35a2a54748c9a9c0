"""oViT: correlation-aware second-order pruning (published as CAP, NeurIPS 2023, arXiv 2210.09223)."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

from pruners.allocation.sharing import Scope
from pruners.elimination.constraints import FewOfEach, Rule, WholeGroups
from pruners.elimination.obs import eliminate
from pruners.elimination.order import LayerOrder
from pruners.methods.dimap import Dimap
from pruners.methods.second_order import (
    Chunk,
    SecondOrder,
    State,
    Steps,
    Task,
    chunks,
    merged,
    room_of,
    stretch_of,
)
from pruners.model.layers import PrunableLayer
from pruners.model.sparsity_pattern import Pattern


@dataclass(frozen=True)
class OViT(SecondOrder):
    """Weights fall one at a time inside Fisher blocks, and each fall is followed by the others of its block.

    A weight's loss is the cumulative OBS loss of its block when it falls; one threshold for the model.
    """

    name: str = "ovit"

    def deepen(self, task: Task, known: LayerOrder | None, steps: int) -> LayerOrder:
        known = task.start() if known is None else known
        state = State.after(task, known)
        found: list[Steps] = []
        stretches = list(state.closed)
        for chunk in chunks(task, state.weight, state.alive):
            rule, most = _rule(task.pattern, chunk, state.alive[chunk.part])
            done = eliminate(
                chunk.weights,
                chunk.inverse,
                chunk.alive,
                rule=rule,
                steps=min(steps, most),
                losses=state.losses[chunk.part],
            )
            found.append(Steps(chunk.slots.gather(1, done.order), done.losses).padded(steps))
            before, taken = state.fallen[chunk.part], 0
            for columns in done.columns:
                begin = before + taken if bool(before.any()) else taken
                stretches.append(stretch_of(chunk, columns, begin))
                taken += columns.v.shape[1]
        return merged(task, known, state, found, stretches)


@dataclass(frozen=True)
class OViTFast(OViT):
    """oViT with the paper's fast settings: few gradients (256), and λ = 1e-2 of the mean diagonal.

    It is the shortcut 'small m with relative damping'; blocks keep a Fisher of their own each.
    """

    damp: float = 1e-2
    relative: bool = True
    gradients: int = 256
    name: str = "ovit_fast"


@dataclass(frozen=True)
class DimapOViT(OViT):
    """DIMAP says how many weights each layer gives up, module by module; oViT which, and what stays."""

    scope: Scope = "module"
    name: str = "dimap+ovit"

    def priced(self, order: LayerOrder, task: Task) -> LayerOrder:
        shape = (1, task.layer.numel)
        flat = PrunableLayer(task.layer.name, task.layer.module, task.layer.stage, shape)
        by_share = Dimap().order(
            {flat.name: task.weight.reshape(shape)}, [flat], {flat.name: ~task.pruned.reshape(shape)}, None
        )
        return replace(order, prices=by_share[flat.name].losses[: len(order.losses)])


def _rule(pattern: Pattern, chunk: Chunk, alive: Tensor) -> tuple[Rule | None, int]:
    """The rule of a pattern, and how many steps any of the blocks can take by it."""
    if not pattern.structured:
        return None, chunk.slots.shape[1]
    if pattern.whole:
        return WholeGroups(pattern.unit), chunk.slots.shape[1]
    room = room_of(pattern, alive)
    return FewOfEach(chunk.slots // pattern.group, room), int(room.sum(1).max())
