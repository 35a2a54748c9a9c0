"""Greedy elimination inside Fisher blocks: Optimal Brain Surgeon, one weight at a time (oViT/CAP, Alg. 1).

With H⁻¹ = F⁻¹ of a block and its weights w, the next weight is ``argmin_j w_j² / (2·[H⁻¹]_jj)``. The other
weights become ``w − H⁻¹_{:,j}·w_j / [H⁻¹]_jj``, and H⁻¹ loses the row and the column of j.

That is a Cholesky factorisation of H⁻¹ with the OBS rule for its pivots. Each step updates the column of the
pivot only, from the normalised columns v of the steps before it, and the diagonal and the weights. On a CPU
compiled code does this block by block. Otherwise all blocks take each step together, in *panels* of steps as
in LAPACK: after a panel one product ``H⁻¹ −= V Vᵀ`` updates the rest of the matrix. The rows of eliminated
weights are dropped from time to time.

======================  =============================================
paper                   here
======================  =============================================
w, the block's weights  ``weights`` (n, B)
[H⁻¹]                   ``inverse`` (n, B, B)
ρ, cumulative loss      ``losses`` (n, steps)
H⁻¹_{:,j} / √[H⁻¹]_jj   ``v`` of a step (n, r)
w_j / √[H⁻¹]_jj         ``y`` of a step (n,)
======================  =============================================
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import Tensor

from pruners.elimination import kernels
from pruners.elimination.constraints import Constraint, Unconstrained
from pruners.elimination.fisher import SumsOfGradients

PANEL = 32
"""Number of steps of a panel."""
_DROP_AT = 0.7  # rows of eliminated weights are dropped when no more than this share of a matrix is left


@dataclass(frozen=True)
class Columns:
    """The updates of consecutive steps to the weights of n blocks: ``w −= Σ y_i·v_i`` over the steps taken.

    Attributes:
        v: normalised columns (n, steps, r), in float32.
        y: coefficients (n, steps), in float32.
        slots: (n, r), the positions that the r numbers of a column belong to; ``None``: all, in order.
        ranked: whether the positions that are eliminated last come first.
    """

    v: Tensor
    y: Tensor
    slots: Tensor | None
    ranked: bool = False


@dataclass(frozen=True)
class Elimination:
    """The steps by which the weights of n blocks are eliminated.

    Attributes:
        order: (n, steps), position of the weight that each step eliminates.
        losses: (n, steps), cumulative and ascending; ``inf`` where a block had no weight left.
        columns: updates of the other weights, for consecutive groups of steps.
        numbers: (n, all numbers v), if ``columns`` are views of them, one panel after the other.
    """

    order: Tensor
    losses: Tensor
    columns: list[Columns]
    numbers: Tensor | None = None


def eliminate(
    weights: Tensor,
    inverse: Tensor,
    alive: Tensor,
    *,
    constraint: Constraint | None = None,
    steps: int | None = None,
    losses: Tensor | None = None,
) -> Elimination:
    """Eliminate the weights of n blocks, each block in its own order.

    Args:
        weights: (n, B); those that are not alive count as zero.
        inverse: (n, B, B), the symmetric inverse Fisher blocks; in rows of weights that are not alive only
            the diagonal is not zero. It is changed in place.
        alive: (n, B) bool, ``False`` for weights that are zero already.
        constraint: which weight may be next; default any.
        steps: number of steps of each block at most; default all.
        losses: (n,), loss of each block before the first step; default 0.

    Returns:
        The steps of every block.
    """
    alive_at_most = int(alive.sum(1).max()) if len(weights) else 0
    steps = alive_at_most if steps is None else min(steps, alive_at_most)
    before = weights.new_zeros(len(weights), dtype=inverse.dtype) if losses is None else losses
    if constraint is None and kernels.threads.supports(inverse) and inverse.dtype == torch.float64:
        return _by_blocks(weights, inverse, alive, steps, before)
    chosen = Unconstrained() if constraint is None else constraint
    return _batched(weights, inverse, alive, constraint=chosen, steps=steps, before=before)


def _by_blocks(weights: Tensor, inverse: Tensor, alive: Tensor, steps: int, before: Tensor) -> Elimination:
    """Eliminate with the compiled loop for CPUs (:mod:`pruners.elimination.kernels`)."""
    blocks, size = weights.shape
    # the loop runs over the first weights of a row, which are those alive
    positions = (~alive).byte().argsort(dim=1, stable=True)
    sorted_already = bool((positions[:, 1:] > positions[:, :-1]).all())
    if not sorted_already:
        weights, inverse = weights.gather(1, positions), _submatrix(inverse, positions)
    inputs = [weights.double().contiguous(), inverse.contiguous(), alive.sum(1), before.double()]
    done, outputs = _compiled_outputs(blocks, size, steps)

    def work(part: slice) -> None:
        kernels.eliminate.eliminate(*(tensor[part].numpy() for tensor in (*inputs, *outputs)))

    kernels.threads.on_threads(work, blocks)
    if sorted_already:
        return done
    columns = [replace(one, slots=positions.gather(1, cast(Tensor, one.slots))) for one in done.columns]
    return replace(done, order=positions.gather(1, done.order), columns=columns)


def eliminate_sums(
    weights: Tensor, sums: SumsOfGradients, alive: Tensor, *, steps: int, losses: Tensor
) -> Elimination | None:
    """:func:`eliminate` without constraints, from the sums that the inverses would be computed from.

    The inverse of a block is eliminated while it is in the cache of a processor's core.

    Args:
        weights: (n, r).
        sums: what :meth:`pruners.elimination.fisher.BlockFisher.on_cpu` returns.
        alive: (n, r) bool; the weights that are alive are the first ones of each block.
        steps: number of steps of each block at most.
        losses: (n,), loss of each block before the first step.

    Returns:
        The steps of every block; ``None`` if the Fisher of some block is not positive definite.
    """
    steps = min(steps, int(alive.sum(1).max()))
    sound = torch.empty(len(weights), dtype=torch.bool)
    inputs = [sound, weights.double().contiguous(), alive.sum(1), losses.double()]
    done, outputs = _compiled_outputs(len(weights), weights.shape[1], steps)

    def work(part: slice) -> None:
        first, last, positions = (one[part].numpy() for one in (sums.first, sums.last, sums.slots))
        rest = (tensor[part].numpy() for tensor in (alive, *inputs, *outputs))
        kernels.eliminate.invert_and_eliminate(first, last, sums.scale, sums.damp, positions, *rest)

    kernels.threads.on_threads(work, len(weights))
    return done if bool(sound.all()) else None


def _compiled_outputs(blocks: int, size: int, steps: int) -> tuple[Elimination, tuple[Tensor, ...]]:
    """Allocate the outputs of the compiled loops, twice: as they are returned, and as the loops take them."""
    widths = range(size, size - steps, -kernels.tiles.PANEL)  # of each panel
    shapes = [(min(kernels.tiles.PANEL, steps - size + width), width) for width in widths]
    order = torch.zeros(blocks, steps, dtype=torch.long)
    losses = torch.full((blocks, steps), torch.inf, dtype=torch.float64)
    y = torch.zeros(blocks, steps)
    v = torch.empty(blocks, sum(panel * width for panel, width in shapes))
    slots = torch.empty(blocks, size, dtype=torch.long)
    panels: list[Columns] = []
    number = 0
    for begin, (panel, width) in enumerate(shapes):
        columns = v[:, number : number + width * panel].view(blocks, panel, width)
        coefficients = y[:, begin * kernels.tiles.PANEL :][:, :panel]
        panels.append(Columns(columns, coefficients, slots[:, :width], ranked=True))
        number += width * panel
    return Elimination(order, losses, panels, v), (order, losses, y, v, slots)


def _batched(
    weights: Tensor, inverse: Tensor, alive: Tensor, *, constraint: Constraint, steps: int, before: Tensor
) -> Elimination:
    """Eliminate in the batched formulation: all blocks take each step together."""
    blocks = len(weights)
    device, kind = weights.device, inverse.dtype
    w = weights.to(kind).masked_fill(~alive, torch.inf)  # infinite weights are never selected
    slots: Tensor | None = None
    order = torch.zeros(steps, blocks, dtype=torch.long, device=device)
    taken = torch.zeros(steps, blocks, dtype=torch.bool, device=device)
    coefficients = torch.zeros(steps, blocks, dtype=kind, device=device)
    inverse = inverse.mT.contiguous()  # LAPACK returns it column-major; it is symmetric
    panel_steps = max(PANEL // constraint.unit, 1) * constraint.unit
    segments: list[Columns] = []
    panels: list[Tensor] = []  # columns of the panels since rows were dropped
    begin = 0
    step = 0
    while step < steps:
        panel = _panel(w, inverse, constraint, min(panel_steps, steps - step))
        count = len(panel.v)
        now = slice(step, step + count)
        order[now] = panel.pivots if slots is None else slots.T.gather(0, panel.pivots)
        taken[now], coefficients[now] = panel.active, panel.y
        # set the pivot's own entry to 0: it is large, and is not used
        panels.append(panel.v.float().scatter_(2, panel.pivots.unsqueeze(2), 0.0))
        step += count
        left = int((~w.isinf()).sum(1).max())
        drop = step < steps and left <= _DROP_AT * w.shape[1]
        if drop or step == steps:
            v = torch.cat(panels).transpose(0, 1)
            segments.append(Columns(v, coefficients[begin:step].T.float(), slots))
            panels, begin = [], step
        if drop:
            positions = w.isinf().byte().argsort(dim=1, stable=True)[:, :left]
            inverse = _submatrix(inverse, positions)
            columns = panel.v.gather(2, positions.expand(count, -1, -1))
            w = w.gather(1, positions)
            slots = positions if slots is None else slots.gather(1, positions)
            constraint.compact(positions)
        else:
            columns = panel.v
        if step < steps:
            inverse.baddbmm_(columns.permute(1, 2, 0), columns.transpose(0, 1), alpha=-1)
    cumulative = coefficients.square().mul_(0.5).cumsum(0) + before
    return Elimination(order.T, cumulative.masked_fill_(~taken, torch.inf).T, segments)


@dataclass(frozen=True)
class _Panel:
    """The steps of a panel.

    Attributes:
        v: (steps, n, r), normalised columns.
        pivots: (steps, n), positions of the eliminated weights.
        y: (steps, n), coefficients.
        active: (steps, n) bool, whether a weight was eliminated at all.
    """

    v: Tensor
    pivots: Tensor
    y: Tensor
    active: Tensor


def _panel(w: Tensor, inverse: Tensor, constraint: Constraint, steps: int) -> _Panel:
    """Take ``steps`` steps with an inverse that is up to date; ``w`` (n, r) is changed in place."""
    blocks, rows = w.shape
    tiny = torch.finfo(w.dtype).tiny
    v = w.new_empty(steps, blocks, rows)
    y = w.new_empty(steps, blocks)
    pivots = torch.empty(steps, blocks, dtype=torch.long, device=w.device)
    active = torch.empty(steps, blocks, dtype=torch.bool, device=w.device)
    diagonal = inverse.diagonal(dim1=1, dim2=2).clamp_min(tiny)
    flat = inverse.view(blocks * rows, rows)
    first = torch.arange(blocks, device=w.device) * rows
    constraint.begin_panel(inverse)
    for step in range(steps):
        score, pivot = constraint.select(w, diagonal)
        at = pivot.unsqueeze(1)
        column = flat.index_select(0, first + pivot)
        if step:  # subtract the earlier steps of this panel
            shares = v[:step].gather(2, at.expand(step, blocks, 1)).permute(1, 2, 0)
            known = v[:step].transpose(0, 1)
            column = torch.baddbmm(column.unsqueeze(1), shares, known, alpha=-1).squeeze(1)
        active[step] = torch.isfinite(score)  # a block may run out of weights before the others
        # without a step the column must be zero; the pivot there is an eliminated weight
        root = diagonal.gather(1, at).sqrt_().masked_fill_(~active[step].unsqueeze(1), torch.inf)
        torch.div(column, root, out=v[step])
        weight = w.gather(1, at)
        share = torch.where(active[step].unsqueeze(1), weight / root, 0.0)
        w.addcmul_(v[step], share, value=-1)
        w.scatter_(1, at, torch.where(active[step].unsqueeze(1), torch.inf, weight))
        diagonal.addcmul_(v[step], v[step], value=-1).clamp_min_(tiny)
        constraint.record(pivot, v[step], active[step])
        pivots[step], y[step] = pivot, share.squeeze(1)
    return _Panel(v, pivots, y, active)


def _submatrix(matrices: Tensor, positions: Tensor) -> Tensor:
    """Rows and columns ``positions`` (n, r) of ``matrices`` (n, B, B).

    Whole rows are selected first, which is a plain copy and faster than gathering both at once.
    """
    blocks, size, _ = matrices.shape
    left = positions.shape[1]
    first = torch.arange(blocks, device=positions.device).unsqueeze(1) * size
    rows = matrices.reshape(blocks * size, size).index_select(0, (first + positions).reshape(-1))
    return rows.view(blocks, left, size).gather(2, positions.unsqueeze(1).expand(-1, left, -1))
