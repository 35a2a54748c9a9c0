"""Least squares over kept weights, against a solver for each output alone."""

from __future__ import annotations

import pytest
import torch
from helpers import quick
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from pruners.reconstruction.least_squares import Moments, solve

TOKENS = 60


def problem(outputs: int, inputs: int, seed: int, share: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Inputs with correlations, wanted outputs, weights and masks with empty and full rows among them."""
    random = torch.Generator().manual_seed(seed)
    mixed = torch.randn(inputs, inputs, generator=random, dtype=torch.double)
    x = torch.randn(TOKENS, inputs, generator=random, dtype=torch.double) @ mixed + 3.0
    y = torch.randn(TOKENS, outputs, generator=random, dtype=torch.double) - 2.0
    mask = torch.rand(outputs, inputs, generator=random) >= share
    mask[0] = False
    mask[-1] = True
    weight = torch.randn(outputs, inputs, generator=random, dtype=torch.double) * mask
    return x, y, weight, mask


def moments_of(x: Tensor, y: Tensor, *, bias: bool) -> Moments:
    moments = Moments(x.shape[1], y.shape[1], x, bias=bias)
    for first in range(0, len(x), 7):
        moments.add(x[first : first + 7], y[first : first + 7])
    return moments


@given(
    shape=st.tuples(st.integers(2, 9), st.integers(1, 12)),
    share=st.sampled_from([0.0, 0.5, 0.9]),
    ridge=st.sampled_from([1e-3, 1e-2, 1.0]),
    bias=st.booleans(),
    seed=st.integers(0, 99),
)
@quick(60)
def test_solve__each_output_is_what_a_direct_solver_says(
    shape: tuple[int, int], share: float, ridge: float, bias: bool, seed: int
) -> None:
    x, y, weight, mask = problem(*shape, seed, share)
    solved = solve(moments_of(x, y, bias=bias), weight, mask, ridge)
    if bias:
        x, y = x - x.mean(0), y - y.mean(0)
    covariance, cross = x.T @ x / len(x), y.T @ x / len(x)
    shift = ridge * covariance.diagonal().mean()
    for row, kept in enumerate(mask):
        inner = covariance[kept][:, kept] + shift * torch.eye(int(kept.sum()), dtype=torch.double)
        expected = torch.linalg.solve(inner, cross[row, kept] + shift * weight[row, kept])
        # in the norm in which errors cost: of outputs, and of the distance that λ punishes
        off, at_first = (weights - expected for weights in (solved[row, kept], weight[row, kept]))
        assert off @ inner @ off <= 1e-9 * (at_first @ inner @ at_first) + 1e-12
        assert not solved[row, ~kept].any()


@pytest.mark.parametrize("bias", [True, False])
def test_moments__error_and_offset_are_those_of_the_outputs(bias: bool) -> None:
    x, y, weight, _ = problem(4, 6, 0, 0.5)
    moments = moments_of(x, y, bias=bias)
    answered = x @ weight.T + (moments.offset(weight) if bias else 0.0)
    if bias:
        torch.testing.assert_close(answered.mean(0), y.mean(0))
    variance = (y - y.mean(0)).square().sum() if bias else y.square().sum()
    assert moments.error(weight) == pytest.approx(float((answered - y).square().sum() / variance))


def test_solve__outputs_that_are_right_already_stay() -> None:
    x, _, weight, mask = problem(5, 8, 1, 0.5)
    solved = solve(moments_of(x, x @ weight.T + 1.5, bias=True), weight, mask, 0.01)
    torch.testing.assert_close(solved, weight, rtol=1e-6, atol=1e-6)


def test_solve__inputs_that_never_vary_leave_weights_as_they_are() -> None:
    x, y = torch.full((9, 3), 2.0), torch.randn(9, 2)
    weight = torch.randn(2, 3)
    solved = solve(moments_of(x, y, bias=True), weight, torch.ones(2, 3, dtype=torch.bool), 0.01)
    assert torch.isfinite(solved).all()


def test_moments__what_is_not_finite_is_seen() -> None:
    x, y, *_ = problem(2, 3, 0, 0.5)
    assert moments_of(x, y, bias=True).finite
    y[5, 1] = torch.nan
    assert not moments_of(x, y, bias=True).finite
