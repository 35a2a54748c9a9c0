"""WoodFisher (Singh & Alistarh, NeurIPS 2020): oViT's Fisher, without correlations inside a step."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pruners.elimination.obs import Columns
from pruners.elimination.order import LayerOrder, Stretch
from pruners.methods.second_order import Chunk, SecondOrder, State, Steps, Task, chunks, merged, stretch_of
from pruners.model.sparsity_pattern import Pattern


@dataclass(frozen=True)
class WoodFisher(SecondOrder):
    """The same Fisher without correlations inside a step: all weights are judged at once by w²/(2[H⁻¹]_jj).

    They are removed together, and the survivors follow each of them by itself (Singh & Alistarh, 2020; the
    ablation that oViT compares itself with).
    """

    name: str = "woodfisher"

    def deepen(self, task: Task, known: LayerOrder | None, steps: int) -> LayerOrder:
        begun = task.start()
        state = State.after(task, begun)
        unit = task.pattern.unit
        found: list[Steps] = []
        stretches: list[Stretch] = []
        for chunk in chunks(task, state.weight, state.alive):
            root = chunk.inverse.diagonal(dim1=1, dim2=2).sqrt()
            coefficients = chunk.weights.masked_fill(~chunk.alive, 0.0) / root
            score = coefficients.square().mul_(0.5)
            free = _free_at_once(task.pattern, score, chunk, task.size)
            blocks, size = score.shape
            # one number for what falls together
            joint = score.masked_fill(~free, torch.inf).reshape(blocks, -1, unit).sum(2)
            losses, ranking = joint.sort(dim=1, stable=True)
            members = torch.arange(unit, device=score.device)
            pivots = (ranking.unsqueeze(2) * unit + members).reshape(blocks, -1)
            v = chunk.inverse.gather(1, pivots.unsqueeze(2).expand(-1, -1, size))
            v /= root.gather(1, pivots).unsqueeze(2)
            columns = Columns(v.float(), coefficients.gather(1, pivots).float(), None)
            stretches.append(stretch_of(chunk, columns, 0))
            fell = Steps(chunk.slots.gather(1, pivots), losses.repeat_interleave(unit, 1))
            found.append(fell.padded(task.size))
        return merged(task, begun, state, found, stretches)


def _free_at_once(pattern: Pattern, score: Tensor, chunk: Chunk, size: int) -> Tensor:
    """(n, r): what may fall when all weights are judged at once."""
    if pattern.forced is None:
        return chunk.alive
    spread = torch.full((len(score), size), -1.0, dtype=score.dtype, device=score.device)
    spread.scatter_(1, chunk.slots, torch.where(chunk.alive, score, -1.0))
    free = pattern.free(spread.reshape(-1), (spread >= 0).reshape(-1)).reshape(spread.shape)
    return free.gather(1, chunk.slots) & chunk.alive
