"""WoodFisher (Singh & Alistarh, NeurIPS 2020): oViT's Fisher, without correlations inside a step.

======================  ====================================================
paper                   here
======================  ====================================================
[F⁻¹]_qq                ``root`` squared (n, r)
w_q² / (2·[F⁻¹]_qq)     ``score`` (n, r)
δw, the update          ``−y·v``: ``y`` = ``coefficients``, ``v`` (n, r, r)
======================  ====================================================
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pruners.elimination.obs import Columns, Elimination
from pruners.elimination.order import LayerOrder
from pruners.methods.second_order import BlockMerge, Chunk, SecondOrder, State, Task, chunks
from pruners.model.sparsity_pattern import Pattern


@dataclass(frozen=True)
class WoodFisher(SecondOrder):
    """Judges all weights at once by w²/(2[H⁻¹]_jj), without correlations between pruned weights.

    Each pruned weight updates the weights that stay as if it were the only one. oViT compares itself with
    this method in its ablation.
    """

    name: str = "woodfisher"

    def extend(self, task: Task, known: LayerOrder | None, steps: int) -> LayerOrder:
        """Compute the whole order of a layer, whatever ``steps`` is (see :meth:`SecondOrder.extend`)."""
        initial = task.initial_order()
        state = State.after(task, initial)
        unit = task.pattern.unit
        merge = BlockMerge(task, initial, state, task.size)
        for chunk in chunks(task, state.weight, state.alive):
            root = chunk.inverse.diagonal(dim1=1, dim2=2).sqrt()
            coefficients = chunk.weights.masked_fill(~chunk.alive, 0.0) / root
            score = coefficients.square().mul_(0.5)
            free = _free_at_once(task.pattern, score, chunk, task.size)
            blocks, size = score.shape
            # one score for weights that are pruned together
            joint = score.masked_fill(~free, torch.inf).reshape(blocks, -1, unit).sum(2)
            losses, ranking = joint.sort(dim=1, stable=True)
            members = torch.arange(unit, device=score.device)
            pivots = (ranking.unsqueeze(2) * unit + members).reshape(blocks, -1)
            v = chunk.inverse.gather(1, pivots.unsqueeze(2).expand(-1, -1, size))
            v /= root.gather(1, pivots).unsqueeze(2)
            v.scatter_(2, pivots.unsqueeze(2), 0.0)  # large, and not used
            columns = Columns(v.float(), coefficients.gather(1, pivots).float(), None)
            merge.add(chunk, Elimination(pivots, losses.repeat_interleave(unit, 1), [columns]))
        return merge.order()


def _free_at_once(pattern: Pattern, score: Tensor, chunk: Chunk, size: int) -> Tensor:
    """The weights that the pattern lets a method prune when it judges all at once, (n, r) bool."""
    if pattern.forced is None:
        return chunk.alive
    spread = torch.full((len(score), size), -1.0, dtype=score.dtype, device=score.device)
    spread.scatter_(1, chunk.slots, torch.where(chunk.alive, score, -1.0))
    free = pattern.free(spread.reshape(-1), (spread >= 0).reshape(-1)).reshape(spread.shape)
    return free.gather(1, chunk.slots) & chunk.alive
