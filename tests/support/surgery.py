"""Optimal Brain Surgeon done the long way, the oracle of eliminations: invert what remains, each time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

from pruners.elimination.constraints import Constraint
from pruners.elimination.obs import Elimination, eliminate

Allowed = Callable[[Sequence[int]], Sequence[Sequence[int]]]
"""From the positions that have fallen: which may fall next, each with those that fall together with it."""


@dataclass
class Surgery:
    """One block's pivots, cumulative losses, and weights after 0, 1, 2, … eliminations."""

    pivots: list[int] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    weights: list[Tensor] = field(default_factory=list)


def surgeon(
    weights: Tensor, fisher: Tensor, alive: Tensor, allowed: Allowed | None = None, *, loss: float = 0.0
) -> Surgery:
    """Remove what has the least joint loss ½·wᵀ([F_KK⁻¹])⁻¹w, one weight at a time, the others corrected.

    Args:
        allowed: default any weight by itself.
        loss: what the block has lost before.
    """
    w = torch.where(alive, weights, 0.0).double()
    kept = alive.nonzero().reshape(-1).tolist()
    done = Surgery(weights=[w.clone()])
    while kept:
        choices = [[place] for place in kept] if allowed is None else allowed(done.pivots)
        if not choices:
            break
        inverse = torch.linalg.inv(fisher[kept][:, kept])

        def joint(group: Sequence[int], inverse: Tensor = inverse) -> float:
            at = [kept.index(place) for place in group]
            return float(0.5 * w[group] @ torch.linalg.solve(inverse[at][:, at], w[group]))

        for pivot in min(choices, key=joint):
            inverse = torch.linalg.inv(fisher[kept][:, kept])
            j = kept.index(pivot)
            loss += float(w[pivot].square() / (2 * inverse[j, j]))
            w[kept] -= inverse[:, j] * w[pivot] / inverse[j, j]
            w[pivot] = 0.0
            done.pivots.append(kept.pop(j))
            done.losses.append(loss)
            done.weights.append(w.clone())
    return done


def few_of_each(size: int, most: int, alive: Tensor) -> Allowed:
    """Of each ``size`` neighbours no more than ``most`` may be zero; the dead count."""

    def allowed(fallen: Sequence[int]) -> Sequence[Sequence[int]]:
        gone = {*fallen, *(~alive).nonzero().reshape(-1).tolist()}
        counts = [sum(place // size == group for place in gone) for group in range(-(-len(alive) // size))]
        return [[place] for place in range(len(alive)) if place not in gone and counts[place // size] < most]

    return allowed


def whole_groups(size: int, alive: Tensor) -> Allowed:
    """Neighbours by ``size`` fall together."""

    def allowed(fallen: Sequence[int]) -> Sequence[Sequence[int]]:
        groups = [list(range(first, first + size)) for first in range(0, len(alive), size)]
        return [group for group in groups if alive[group[0]] and group[0] not in fallen]

    return allowed


def blocks_of(
    seed: int, blocks: int, size: int, *, alive_share: float, unit: int = 1
) -> tuple[Tensor, Tensor, Tensor]:
    """Random weights (n, B), strongly correlated Fisher blocks (n, B, B), and who is alive (n, B)."""
    random = torch.Generator().manual_seed(seed)
    gradients = torch.randn(blocks, size + 2, size, generator=random, dtype=torch.float64)
    gradients += torch.randn(blocks, size + 2, 1, generator=random, dtype=torch.float64)
    fisher = gradients.mT @ gradients / (size + 2) + 1e-2 * torch.eye(size, dtype=torch.float64)
    weights = torch.randn(blocks, size, generator=random, dtype=torch.float64)
    alive = torch.rand(blocks, size // unit, generator=random) < alive_share
    return weights, fisher, alive.repeat_interleave(unit, 1)


def inverse_of(fisher: Tensor, alive: Tensor) -> Tensor:
    """As the pruner gives it: dead weights stand alone."""
    together = alive.unsqueeze(1) & alive.unsqueeze(2)
    return torch.linalg.inv(torch.where(together, fisher, 0.0) + torch.diag_embed((~alive).double()))


def eliminated(
    weights: Tensor,
    fisher: Tensor,
    alive: Tensor,
    *,
    constraint: Constraint | None = None,
    steps: int | None = None,
    losses: Tensor | None = None,
) -> Elimination:
    return eliminate(
        weights, inverse_of(fisher, alive), alive, constraint=constraint, steps=steps, losses=losses
    )


def assert_idle_steps_do_nothing(done: Elimination) -> None:
    """A product with the steps that a block did not take must not leave its weights as NaN."""
    begun = 0
    for columns in done.columns:
        fell = done.losses[:, begun : begun + columns.y.shape[1]].isfinite()
        assert torch.isfinite(columns.v).all()
        assert not columns.v[~fell].any()
        assert not columns.y[~fell].any()
        begun += columns.y.shape[1]


def weights_after(done: Elimination, weights: Tensor, alive: Tensor, block: int, count: int) -> Tensor:
    """w(c) = w(0) − Σ_{i<c} y_i·v_i, what has fallen set to 0."""
    result = torch.where(alive[block], weights[block], 0.0).double()
    begun = 0
    for columns in done.columns:
        taken = min(max(count - begun, 0), columns.y.shape[1])
        slots = torch.arange(len(result)) if columns.slots is None else columns.slots[block]
        moved = columns.y[block, :taken].double() @ columns.v[block, :taken].double()
        if columns.ranked:  # what falls later comes first; no more of it is promised than has not fallen
            stay = len(slots) - taken
            slots, moved = slots[:stay], moved[:stay]
        result[slots] -= moved
        begun += columns.y.shape[1]
    result[done.order[block, :count]] = 0.0
    return torch.where(alive[block], result, 0.0)


def assert_follows(
    done: Elimination, block: int, expected: Surgery, problem: tuple[Tensor, Tensor], steps: int
) -> None:
    """A block fell as the oracle says, for up to ``steps``; ``problem``: weights (n, B), and who is alive."""
    weights, alive = problem
    count = min(len(expected.pivots), steps)
    assert done.order[block, :count].tolist() == expected.pivots[:count]
    assert done.losses[block, :count].tolist() == pytest.approx(expected.losses[:count], rel=1e-9)
    assert (done.losses[block, count:] == torch.inf).all()
    for step in range(count + 1):
        corrected = weights_after(done, weights, alive, block, step)
        torch.testing.assert_close(corrected, expected.weights[step], rtol=1e-5, atol=1e-5)
