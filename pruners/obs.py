"""Greedy elimination inside Fisher blocks: Optimal Brain Surgeon, one weight at a time (oViT/CAP, Alg. 1).

With H⁻¹ = F⁻¹ of a block and w its weights, the weight that falls next is ``argmin_j w_j² / (2·[H⁻¹]_jj)``;
the others become ``w − H⁻¹_{:,j}·w_j / [H⁻¹]_jj`` and H⁻¹ loses the row and column of j.

Only the current diagonal and one current column of H⁻¹ are ever needed, so the downdates are kept as the
columns V removed so far (a pivoted Cholesky with the OBS pivot rule): ``column_j = H⁻¹_{:,j} − Vᵀ V_{:,j}``,
``diag −= v²``. Same pivots and losses as the rank-one downdates at a quarter of the memory traffic.

======================  ============================================
paper                   here
======================  ============================================
w, the block's weights  ``weights`` (n, B)
[H⁻¹]                   ``inverse`` (n, B, B)
ρ, cumulative loss      ``losses`` (n, B)
======================  ============================================
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Elimination:
    """What fell when.

    ``order`` (n, steps): positions in the block; ``losses`` (n, steps): cumulative, ascending, ``inf`` where
    a block had no weight left; ``columns`` (n, steps, B) and ``coefficients`` (n, steps): v and y of
    ``w(c) = w(0) − Σ_{i<c} y_i·v_i``.
    """

    order: Tensor
    losses: Tensor
    columns: Tensor
    coefficients: Tensor


def eliminate(weights: Tensor, inverse: Tensor, alive: Tensor) -> Elimination:
    """Eliminate every weight of ``n`` blocks, each block in its own order.

    Args:
        weights: (n, B); what is not alive counts as zero.
        inverse: (n, B, B), the inverse Fisher blocks; rows of weights that are not alive stand alone.
        alive: (n, B) bool, ``False`` for weights that are zero already.
    """
    blocks, size = weights.shape
    rows = torch.arange(blocks, device=weights.device)
    w = (weights * alive).to(inverse.dtype)
    diagonal = inverse.diagonal(dim1=1, dim2=2).clone()
    tiny = torch.finfo(inverse.dtype).tiny
    left = alive.clone()
    columns = inverse.new_zeros(blocks, size, size)
    coefficients = inverse.new_zeros(blocks, size)
    losses = inverse.new_full((blocks, size), torch.inf)
    order = torch.zeros(blocks, size, dtype=torch.long, device=weights.device)
    loss = inverse.new_zeros(blocks)

    for step in range(int(alive.sum(1).max()) if blocks else 0):
        score = (w.square() / diagonal).masked_fill_(~left, torch.inf)
        pivot = score.argmin(1)
        active = left[rows, pivot]  # a block may run out of weights before the others
        column = inverse[rows, pivot]
        if step:
            known = columns[:, :step]
            shares = known[rows, :, pivot].unsqueeze(1)
            column = torch.baddbmm(column.unsqueeze(1), shares, known, alpha=-1).squeeze(1)
        root = diagonal[rows, pivot].clamp_min(tiny).sqrt()
        v = column / root.unsqueeze(1)
        v *= left & active.unsqueeze(1)  # what has fallen stays at zero
        y = torch.where(active, w[rows, pivot] / root, 0.0)
        columns[:, step] = v
        coefficients[:, step] = y
        order[:, step] = pivot
        loss = loss + 0.5 * y.square()
        losses[:, step] = torch.where(active, loss, torch.inf)
        w -= y.unsqueeze(1) * v
        diagonal = (diagonal - v.square()).clamp_min_(tiny)
        left[rows, pivot] = False
    return Elimination(order, losses, columns, coefficients)
