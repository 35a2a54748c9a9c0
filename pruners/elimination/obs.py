"""Greedy elimination inside Fisher blocks: Optimal Brain Surgeon, one weight at a time (oViT/CAP, Alg. 1).

With H⁻¹ = F⁻¹ of a block and w its weights, the weight that falls next is ``argmin_j w_j² / (2·[H⁻¹]_jj)``;
the others become ``w − H⁻¹_{:,j}·w_j / [H⁻¹]_jj`` and H⁻¹ loses the row and column of j.

That is a Cholesky factorisation of H⁻¹ with the OBS rule for its pivots: only the pivot's column is brought
up to date, from the normalised columns v of the steps before, with the diagonal and the weights. On a CPU
compiled code does it block by block. Otherwise all blocks take a step together, in *panels* as libraries
factorise: after each, one product ``H⁻¹ −= V Vᵀ`` brings up the rest; fallen rows are dropped in between.

======================  =============================================
paper                   here
======================  =============================================
w, the block's weights  ``weights`` (n, B)
[H⁻¹]                   ``inverse`` (n, B, B)
ρ, cumulative loss      ``losses`` (n, steps)
======================  =============================================
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pruners.elimination import kernels
from pruners.elimination.constraints import AnyWeight, Rule

PANEL = 32
_DROP_AT = 0.7  # fallen rows are dropped when no more than this share of a matrix is left


@dataclass(frozen=True)
class Columns:
    """What ``steps`` steps do to the weights of n blocks: ``w −= Σ y_i·v_i`` over the steps taken.

    ``v`` (n, steps, r) and ``y`` (n, steps) in float32; ``slots`` (n, r) are the positions that the r
    numbers of a column stand for (those left when the stretch began), or ``None`` for all in order; with
    ``ranked`` those that stay longest come first.
    """

    v: Tensor
    y: Tensor
    slots: Tensor | None
    ranked: bool = False


@dataclass(frozen=True)
class Elimination:
    """What fell when.

    ``order`` (n, steps): positions in the block; ``losses`` (n, steps): cumulative, ascending, ``inf`` where
    a block had no weight left to lose; ``columns``: the steps in stretches, first to last.
    """

    order: Tensor
    losses: Tensor
    columns: list[Columns]


def eliminate(
    weights: Tensor,
    inverse: Tensor,
    alive: Tensor,
    *,
    rule: Rule | None = None,
    steps: int | None = None,
    losses: Tensor | None = None,
) -> Elimination:
    """Eliminate the weights of ``n`` blocks, each block in its own order.

    Args:
        weights: (n, B); what is not alive counts as zero.
        inverse: (n, B, B), the inverse Fisher blocks, symmetric; rows of weights that are not alive stand
            alone. It is worked on in place.
        alive: (n, B) bool, ``False`` for weights that are zero already.
        rule: what may fall; default any weight.
        steps: how many weights a block loses at most; default all.
        losses: (n,), what each block has lost before.
    """
    alive_at_most = int(alive.sum(1).max()) if len(weights) else 0
    steps = alive_at_most if steps is None else min(steps, alive_at_most)
    before = weights.new_zeros(len(weights), dtype=inverse.dtype) if losses is None else losses
    if rule is None and kernels.fit(inverse) and inverse.dtype == torch.float64:
        return _one_by_one(weights, inverse, alive, steps, before)
    chosen = AnyWeight() if rule is None else rule
    return _together(weights, inverse, alive, rule=chosen, steps=steps, before=before)


def _one_by_one(weights: Tensor, inverse: Tensor, alive: Tensor, steps: int, before: Tensor) -> Elimination:
    """The compiled loop for CPUs: each thread takes whole blocks (see :mod:`pruners.elimination.kernels`)."""
    blocks, size = weights.shape
    # what is alive comes first in a row, for the loop to run over
    places = (~alive).byte().argsort(dim=1, stable=True)
    sorted_already = bool((places[:, 1:] > places[:, :-1]).all())
    if not sorted_already:
        weights, inverse = weights.gather(1, places), _submatrix(inverse, places)
    # the columns of PANEL steps lie together, (n, r, steps) numbers, of what was left when they began
    begins = range(0, steps, PANEL)
    shapes = [(blocks, size - begin, min(PANEL, steps - begin)) for begin in begins]
    ends = np.cumsum([math.prod(shape) for shape in shapes])
    number = np.arange(steps)
    widths = (size - number // PANEL * PANEL).astype(np.int64)
    strides = np.array([shapes[step // PANEL][2] for step in number], dtype=np.int64) * widths
    offsets = np.array([ends[step // PANEL - 1] if step >= PANEL else 0 for step in number], dtype=np.int64)
    order = torch.zeros(blocks, steps, dtype=torch.long)
    found = torch.full((blocks, steps), torch.inf, dtype=torch.float64)
    y = torch.zeros(blocks, steps)
    v = torch.empty(int(ends[-1]) if steps else 0)
    slots = torch.empty(blocks, size, dtype=torch.long)
    given = [weights.double().contiguous(), inverse.contiguous(), alive.sum(1), before.double()]

    def work(part: slice) -> None:
        w, h, left, lost = (one[part].numpy() for one in given)
        written = (order[part].numpy(), found[part].numpy(), y[part].numpy(), v.numpy(), slots[part].numpy())
        kernels.eliminate(w, h, left, lost, offsets, widths, strides, part.start, *written)

    kernels.on_threads(work, blocks)
    if not sorted_already:
        order, slots = places.gather(1, order), places.gather(1, slots)
    stretches = []
    for begin, shape, end in zip(begins, shapes, ends, strict=True):
        numbers = v[end - math.prod(shape) : end].view(shape).mT
        stretches.append(Columns(numbers, y[:, begin : begin + shape[2]], slots[:, : shape[1]], True))
    return Elimination(order, found, stretches)


def _together(
    weights: Tensor, inverse: Tensor, alive: Tensor, *, rule: Rule, steps: int, before: Tensor
) -> Elimination:
    """The batched formulation: all blocks take a step together."""
    blocks = len(weights)
    device, kind = weights.device, inverse.dtype
    w = weights.to(kind).masked_fill(~alive, torch.inf)  # infinite: fallen, never to be picked
    slots: Tensor | None = None
    order = torch.zeros(steps, blocks, dtype=torch.long, device=device)
    fell = torch.zeros(steps, blocks, dtype=torch.bool, device=device)
    coefficients = torch.zeros(steps, blocks, dtype=kind, device=device)
    inverse = inverse.mT.contiguous()  # LAPACK leaves columns in rows; it is symmetric
    at_once = max(PANEL // rule.unit, 1) * rule.unit
    stretches: list[Columns] = []
    waiting: list[Tensor] = []
    begun = 0
    step = 0
    while step < steps:
        panel = _panel(w, inverse, rule, min(at_once, steps - step))
        took = len(panel.v)
        now = slice(step, step + took)
        order[now] = panel.pivots if slots is None else slots.T.gather(0, panel.pivots)
        fell[now], coefficients[now] = panel.active, panel.y
        waiting.append(panel.v.float())
        step += took
        left = int((~w.isinf()).sum(1).max())
        drop = step < steps and left <= _DROP_AT * w.shape[1]
        if drop or step == steps:
            v = torch.cat(waiting).transpose(0, 1)
            stretches.append(Columns(v, coefficients[begun:step].T.float(), slots))
            waiting, begun = [], step
        if drop:
            places = w.isinf().byte().argsort(dim=1, stable=True)[:, :left]
            inverse = _submatrix(inverse, places)
            columns = panel.v.gather(2, places.expand(took, -1, -1))
            w = w.gather(1, places)
            slots = places if slots is None else slots.gather(1, places)
            rule.keep(places)
        else:
            columns = panel.v
        if step < steps:
            inverse.baddbmm_(columns.permute(1, 2, 0), columns.transpose(0, 1), alpha=-1)
    cumulative = coefficients.square().mul_(0.5).cumsum(0) + before
    return Elimination(order.T, cumulative.masked_fill_(~fell, torch.inf).T, stretches)


@dataclass(frozen=True)
class _Panel:
    """``v`` (steps, n, r), and (steps, n) each: pivots, coefficients, and whether a weight fell at all."""

    v: Tensor
    pivots: Tensor
    y: Tensor
    active: Tensor


def _panel(w: Tensor, inverse: Tensor, rule: Rule, steps: int) -> _Panel:
    """``steps`` eliminations by an inverse that is up to date; ``w`` (n, r) changes in place."""
    blocks, rows = w.shape
    tiny = torch.finfo(w.dtype).tiny
    v = w.new_empty(steps, blocks, rows)
    y = w.new_empty(steps, blocks)
    pivots = torch.empty(steps, blocks, dtype=torch.long, device=w.device)
    active = torch.empty(steps, blocks, dtype=torch.bool, device=w.device)
    diagonal = inverse.diagonal(dim1=1, dim2=2).clamp_min(tiny)
    flat = inverse.view(blocks * rows, rows)
    first = torch.arange(blocks, device=w.device) * rows
    rule.start(inverse)
    for step in range(steps):
        score, pivot = rule.pick(w, diagonal)
        at = pivot.unsqueeze(1)
        column = flat.index_select(0, first + pivot)
        if step:  # what the panel's own steps have taken from it
            shares = v[:step].gather(2, at.expand(step, blocks, 1)).permute(1, 2, 0)
            known = v[:step].transpose(0, 1)
            column = torch.baddbmm(column.unsqueeze(1), shares, known, alpha=-1).squeeze(1)
        active[step] = torch.isfinite(score)  # a block may run out of weights before the others
        # where nothing falls the column is zero, not whatever a fallen pivot leaves
        root = diagonal.gather(1, at).sqrt_().masked_fill_(~active[step].unsqueeze(1), torch.inf)
        torch.div(column, root, out=v[step])
        weight = w.gather(1, at)
        share = torch.where(active[step].unsqueeze(1), weight / root, 0.0)
        w.addcmul_(v[step], share, value=-1)
        w.scatter_(1, at, torch.where(active[step].unsqueeze(1), torch.inf, weight))
        diagonal.addcmul_(v[step], v[step], value=-1).clamp_min_(tiny)
        rule.fell(pivot, v[step], active[step])
        pivots[step], y[step] = pivot, share.squeeze(1)
    return _Panel(v, pivots, y, active)


def _submatrix(matrices: Tensor, places: Tensor) -> Tensor:
    """Rows and columns ``places`` (n, r) of ``matrices`` (n, B, B): whole rows first, by plain copies."""
    blocks, size, _ = matrices.shape
    left = places.shape[1]
    first = torch.arange(blocks, device=places.device).unsqueeze(1) * size
    rows = matrices.reshape(blocks * size, size).index_select(0, (first + places).reshape(-1))
    return rows.view(blocks, left, size).gather(2, places.unsqueeze(1).expand(-1, left, -1))
