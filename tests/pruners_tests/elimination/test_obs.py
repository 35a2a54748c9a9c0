"""The elimination against Optimal Brain Surgeon done the long way, compiled for CPUs and batched for GPUs."""

from __future__ import annotations

import pytest
import torch
from helpers import quick, threads
from hypothesis import given
from hypothesis import strategies as st
from surgery import (
    assert_follows,
    assert_idle_steps_do_nothing,
    blocks_of,
    eliminated,
    inverse_of,
    surgeon,
    weights_after,
)
from torch import Tensor

from pruners.elimination import obs
from pruners.elimination.constraints import Unconstrained
from pruners.elimination.obs import Elimination

RULES = {"compiled": None, "batched": Unconstrained()}
both_paths = pytest.mark.parametrize("path", RULES)

cases = given(
    seed=st.integers(0, 10**6),
    blocks=st.integers(1, 4),
    size=st.one_of(st.integers(1, 9), st.sampled_from([33, 50])),  # a panel has 32 steps
    alive_share=st.sampled_from([1.0, 0.6, 0.2]),  # with 0.2 some blocks run out long before others
)


def test_obs__both_paths_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    taken = []
    for name in ("_by_blocks", "_batched"):
        real = getattr(obs, name)
        monkeypatch.setattr(
            obs, name, lambda *a, real=real, name=name, **k: (taken.append(name), real(*a, **k))[1]
        )
    problem = blocks_of(0, 2, 4, alive_share=1.0)
    for rule in RULES.values():
        eliminated(*problem, constraint=rule)
    assert taken == ["_by_blocks", "_batched"]


def assert_surgery(
    done: Elimination, problem: tuple[Tensor, Tensor, Tensor], steps: int, before: Tensor | None = None
) -> None:
    weights, fisher, alive = problem
    assert_idle_steps_do_nothing(done)
    for block in range(len(weights)):
        lost = 0.0 if before is None else float(before[block])
        expected = surgeon(weights[block], fisher[block], alive[block], loss=lost)
        assert_follows(done, block, expected, (weights, alive), steps)


@both_paths
@cases
@quick(40)
def test_obs__same_pivots_losses_and_weights_as_the_surgeon(
    path: str, seed: int, blocks: int, size: int, alive_share: float
) -> None:
    problem = blocks_of(seed, blocks, size, alive_share=alive_share)
    done = eliminated(*problem, constraint=RULES[path])
    assert done.order.shape == (blocks, int(problem[2].sum(1).max()))
    assert_surgery(done, problem, size)


@both_paths
@given(seed=st.integers(0, 10**6), size=st.sampled_from([7, 40]), share=st.sampled_from([0.1, 0.5, 0.9]))
@quick(25)
def test_obs__some_steps_are_the_first_of_all_and_losses_go_on_from_those_before(
    path: str, seed: int, size: int, share: float
) -> None:
    problem = blocks_of(seed, 3, size, alive_share=0.8)
    steps = max(int(share * size), 1)
    before = torch.tensor([0.0, 1.5, 30.0], dtype=torch.float64)
    first_steps = eliminated(*problem, constraint=RULES[path], steps=steps, losses=before)
    assert first_steps.order.shape[1] <= steps
    assert sum(columns.v.shape[1] for columns in first_steps.columns) == first_steps.order.shape[1]
    assert_surgery(first_steps, problem, steps, before)


@both_paths
@cases
@quick(25)
def test_obs__weights_are_the_closed_form_of_what_remains(
    path: str, seed: int, blocks: int, size: int, alive_share: float
) -> None:
    weights, fisher, alive = blocks_of(seed, blocks, size, alive_share=alive_share)
    done = eliminated(weights, fisher, alive, constraint=RULES[path])
    for block in range(blocks):
        for count in range(int(alive[block].sum()) + 1):
            fallen = done.order[block, :count]
            kept = alive[block].clone()
            kept[fallen] = False
            f, w = fisher[block], weights[block]
            expected = torch.zeros_like(w)
            # w_K + F_KK⁻¹ F_KS w_S
            expected[kept] = w[kept] + torch.linalg.solve(f[kept][:, kept], f[kept][:, fallen] @ w[fallen])
            corrected = weights_after(done, weights, alive, block, count)
            torch.testing.assert_close(corrected, expected, rtol=1e-5, atol=1e-5)


@both_paths
@cases
@quick(25)
def test_obs__losses_ascend_and_are_half_the_squared_coefficients(
    path: str, seed: int, blocks: int, size: int, alive_share: float
) -> None:
    problem = blocks_of(seed, blocks, size, alive_share=alive_share)
    alive = problem[2]
    done = eliminated(*problem, constraint=RULES[path])
    y = torch.cat([columns.y for columns in done.columns], 1) if done.columns else torch.zeros(blocks, 0)
    for block in range(blocks):
        count = int(alive[block].sum())
        losses = done.losses[block, :count]
        assert (losses.diff() >= 0).all()
        squares = 0.5 * y[block, :count].double().square().cumsum(0)
        torch.testing.assert_close(losses, squares, rtol=1e-5, atol=1e-9)
        assert (y[block, count:] == 0).all()
        assert sorted(done.order[block, :count].tolist()) == alive[block].nonzero().reshape(-1).tolist()


@pytest.mark.parametrize("size", [64, 192])
@pytest.mark.parametrize("alive_share", [1.0, 0.5])
def test_obs__compiled_and_batched_agree_at_full_size(size: int, alive_share: float) -> None:
    problem = blocks_of(1, 3, size, alive_share=alive_share)
    compiled, batched = (eliminated(*problem, constraint=rule) for rule in RULES.values())
    for block in range(3):
        count = int(problem[2][block].sum())
        assert torch.equal(compiled.order[block, :count], batched.order[block, :count])
        for step in (1, count // 3, count - 1):
            compiled_weights, batched_weights = (
                weights_after(done, *problem[::2], block, step) for done in (compiled, batched)
            )
            torch.testing.assert_close(compiled_weights, batched_weights, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(compiled.losses, batched.losses, rtol=1e-9, atol=0)


def test_obs__threads_share_the_blocks_and_change_nothing() -> None:
    problem = blocks_of(2, 5, 40, alive_share=0.7)
    with threads(1):
        serial = eliminated(*problem)
    with threads(2):
        parallel = eliminated(*problem)
    assert torch.equal(serial.order, parallel.order)
    assert torch.equal(serial.losses, parallel.losses)
    for left, right in zip(serial.columns, parallel.columns, strict=True):
        assert torch.equal(left.v, right.v)
        assert torch.equal(left.y, right.y)
        assert left.slots is not None
        assert right.slots is not None
        assert torch.equal(left.slots, right.slots)


@both_paths
def test_obs__the_loss_is_the_quadratic_form_of_the_whole_change(path: str) -> None:
    weights, fisher, alive = blocks_of(3, 1, 8, alive_share=1.0)
    done = eliminated(weights, fisher, alive, constraint=RULES[path])
    for count in range(1, 9):
        delta = weights_after(done, weights, alive, 0, count) - weights[0]
        assert float(done.losses[0, count - 1]) == pytest.approx(float(0.5 * delta @ fisher[0] @ delta))


@both_paths
def test_obs__correlations_are_followed(path: str) -> None:
    """Two weights that do the same: once one has fallen the other carries both, and stays."""
    fisher = torch.tensor([[[1.0, 0.99, 0.0], [0.99, 1.0, 0.0], [0.0, 0.0, 1.0]]], dtype=torch.float64)
    weights = torch.tensor([[0.5, 0.6, 0.7]], dtype=torch.float64)
    alive = torch.ones(1, 3, dtype=torch.bool)
    done = eliminated(weights, fisher, alive, constraint=RULES[path])
    assert done.order[0].tolist() == [0, 2, 1]  # by magnitude alone 1 would fall before 2
    assert weights_after(done, weights, alive, 0, 1).tolist() == pytest.approx([0.0, 0.6 + 0.99 * 0.5, 0.7])


@both_paths
def test_obs__blocks_without_a_living_weight(path: str) -> None:
    weights, fisher, alive = blocks_of(0, 2, 4, alive_share=1.0)
    alive[0] = False
    done = eliminated(weights, fisher, alive, constraint=RULES[path])
    assert (done.losses[0] == torch.inf).all()
    assert all((columns.y[0] == 0).all() for columns in done.columns)
    assert_surgery(done, (weights, fisher, alive), 4)
    alive[:] = False
    assert eliminated(weights, fisher, alive, constraint=RULES[path]).order.shape == (2, 0)
    none = obs.eliminate(weights[:0], inverse_of(fisher, alive)[:0], alive[:0], constraint=RULES[path])
    assert none.order.shape == (0, 0)
