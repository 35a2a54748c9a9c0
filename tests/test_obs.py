"""The elimination against Optimal Brain Surgeon done the long way: invert what remains, at every step."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from helpers import quick
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from pruners.obs import Elimination, eliminate


@dataclass
class Surgery:
    """One block's pivots, cumulative losses, and weights after 0, 1, 2, … eliminations."""

    pivots: list[int]
    losses: list[float]
    weights: list[Tensor]


def surgeon(weights: Tensor, fisher: Tensor, alive: Tensor) -> Surgery:
    """The oracle: remove the weight of least w²/(2·[F_KK⁻¹]_jj), correct the others, invert anew."""
    w = torch.where(alive, weights, 0.0)
    kept = alive.nonzero().reshape(-1).tolist()
    result = Surgery([], [], [w.clone()])
    loss = 0.0
    while kept:
        inverse = torch.linalg.inv(fisher[kept][:, kept])
        scores = w[kept].square() / (2 * inverse.diagonal())
        j = int(scores.argmin())
        loss += float(scores[j])
        w[kept] -= inverse[:, j] * w[kept[j]] / inverse[j, j]
        w[kept[j]] = 0.0
        result.pivots.append(kept.pop(j))
        result.losses.append(loss)
        result.weights.append(w.clone())
    return result


def problem(seed: int, blocks: int, size: int, *, alive_share: float) -> tuple[Tensor, Tensor, Tensor]:
    """Random weights (n, B), strongly correlated Fisher blocks (n, B, B), and who is alive (n, B)."""
    random = torch.Generator().manual_seed(seed)
    gradients = torch.randn(blocks, size + 2, size, generator=random, dtype=torch.float64)
    gradients += torch.randn(blocks, size + 2, 1, generator=random, dtype=torch.float64)
    fisher = gradients.mT @ gradients / (size + 2) + 1e-2 * torch.eye(size, dtype=torch.float64)
    weights = torch.randn(blocks, size, generator=random, dtype=torch.float64)
    alive = torch.rand(blocks, size, generator=random) < alive_share
    return weights, fisher, alive


def run(weights: Tensor, fisher: Tensor, alive: Tensor) -> Elimination:
    """As the pruner calls it: dead weights stand alone in the inverse."""
    together = alive.unsqueeze(1) & alive.unsqueeze(2)
    alone = torch.where(together, fisher, 0.0) + torch.diag_embed((~alive).double())
    return eliminate(weights, torch.linalg.inv(alone), alive)


def weights_after(done: Elimination, weights: Tensor, alive: Tensor, block: int, count: int) -> Tensor:
    """w(c) = w(0) − Σ_{i<c} y_i·v_i, what has fallen set to 0."""
    result = torch.where(alive[block], weights[block], 0.0)
    result = result - done.coefficients[block, :count] @ done.columns[block, :count]
    result[done.order[block, :count]] = 0.0
    return result


cases = given(
    seed=st.integers(0, 10**6),
    blocks=st.integers(1, 4),
    size=st.integers(1, 9),
    alive_share=st.sampled_from([1.0, 0.6, 0.2]),  # with 0.2 some blocks run out long before others
)


@cases
@quick(60)
def test_same_pivots_losses_and_weights_as_the_surgeon(
    seed: int, blocks: int, size: int, alive_share: float
) -> None:
    weights, fisher, alive = problem(seed, blocks, size, alive_share=alive_share)
    done = run(weights, fisher, alive)
    for block in range(blocks):
        expected = surgeon(weights[block], fisher[block], alive[block])
        count = len(expected.pivots)
        assert done.order[block, :count].tolist() == expected.pivots
        assert done.losses[block, :count].tolist() == pytest.approx(expected.losses, rel=1e-9)
        assert (done.losses[block, count:] == torch.inf).all()
        assert (done.columns[block, count:] == 0).all()
        assert (done.coefficients[block, count:] == 0).all()
        for step in range(count + 1):
            found = weights_after(done, weights, alive, block, step)
            torch.testing.assert_close(found, expected.weights[step], rtol=1e-9, atol=1e-11)


@cases
@quick(60)
def test_weights_are_the_closed_form_of_what_remains(
    seed: int, blocks: int, size: int, alive_share: float
) -> None:
    weights, fisher, alive = problem(seed, blocks, size, alive_share=alive_share)
    done = run(weights, fisher, alive)
    for block in range(blocks):
        for count in range(int(alive[block].sum()) + 1):
            fallen = done.order[block, :count]
            kept = alive[block].clone()
            kept[fallen] = False
            f, w = fisher[block], weights[block]
            expected = torch.zeros_like(w)
            # w_K + F_KK⁻¹ F_KS w_S
            expected[kept] = w[kept] + torch.linalg.solve(f[kept][:, kept], f[kept][:, fallen] @ w[fallen])
            found = weights_after(done, weights, alive, block, count)
            torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-10)


@cases
@quick(30)
def test_losses_ascend_and_are_half_the_squared_coefficients(
    seed: int, blocks: int, size: int, alive_share: float
) -> None:
    weights, fisher, alive = problem(seed, blocks, size, alive_share=alive_share)
    done = run(weights, fisher, alive)
    for block in range(blocks):
        count = int(alive[block].sum())
        losses = done.losses[block, :count]
        assert (losses.diff() >= 0).all()
        torch.testing.assert_close(losses, 0.5 * done.coefficients[block, :count].square().cumsum(0))
        assert sorted(done.order[block, :count].tolist()) == alive[block].nonzero().reshape(-1).tolist()


def test_the_loss_is_the_quadratic_form_of_the_whole_change() -> None:
    weights, fisher, alive = problem(3, 1, 8, alive_share=1.0)
    done = run(weights, fisher, alive)
    for count in range(1, 9):
        delta = weights_after(done, weights, alive, 0, count) - weights[0]
        assert float(done.losses[0, count - 1]) == pytest.approx(float(0.5 * delta @ fisher[0] @ delta))


def test_correlations_are_followed() -> None:
    """Two weights that do the same: once one has fallen the other carries both, and stays."""
    fisher = torch.tensor([[[1.0, 0.99, 0.0], [0.99, 1.0, 0.0], [0.0, 0.0, 1.0]]], dtype=torch.float64)
    weights = torch.tensor([[0.5, 0.6, 0.7]], dtype=torch.float64)
    done = run(weights, fisher, torch.ones(1, 3, dtype=torch.bool))
    assert done.order[0].tolist() == [0, 2, 1]  # by magnitude alone 1 would fall before 2
    after = weights_after(done, weights, torch.ones(1, 3, dtype=torch.bool), 0, 1)
    assert after.tolist() == pytest.approx([0.0, 0.6 + 0.99 * 0.5, 0.7])


def test_blocks_without_a_living_weight() -> None:
    weights, fisher, alive = problem(0, 2, 4, alive_share=1.0)
    alive[:] = False
    done = run(weights, fisher, alive)
    assert (done.losses == torch.inf).all()
    assert (done.coefficients == 0).all()
    empty = eliminate(weights[:0], fisher[:0], alive[:0])
    assert empty.order.shape == (0, 4)
