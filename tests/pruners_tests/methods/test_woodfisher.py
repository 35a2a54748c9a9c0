"""WoodFisher against its formula, written out: all weights judged at once, single updates added up."""

from __future__ import annotations

import pytest
import torch
from layer_problems import DAMP, Problem, problem
from torch import Tensor

from pruners.methods import second_order
from pruners.methods.ovit import OViT
from pruners.methods.woodfisher import WoodFisher


def inverses(given: Problem, size: int) -> Tensor:
    """(d, d): each block's inverse over what is alive; nothing between blocks, nor for the dead."""
    f, inverse = given.fisher(), torch.zeros(given.layer.numel, given.layer.numel, dtype=torch.float64)
    for start in range(0, len(f), size):
        living = [place for place in range(start, min(start + size, len(f))) if given.alive[place]]
        index = torch.tensor(living)
        if living:
            inverse[index.unsqueeze(1), index] = torch.linalg.inv(f[index][:, index])
    return inverse


def scores(given: Problem, size: int) -> Tensor:
    """w² / (2·[H⁻¹]_jj), and 0 for the dead."""
    return torch.where(
        given.alive, given.flat.square() / (2 * inverses(given, size).diagonal().clamp_min(1e-300)), 0.0
    )


def all_at_once(given: Problem, size: int, fallen: list[int]) -> Tensor:
    """w − Σ_j H⁻¹_{:,j}·w_j/[H⁻¹]_jj over what falls and was alive, and then zero there."""
    w, h = given.flat, inverses(given, size)
    result = w.clone()
    for j in fallen:
        if given.alive[j]:
            result -= h[:, j] * w[j] / h[j, j]
    result[fallen] = 0.0
    return result


@pytest.mark.parametrize(("numel", "size"), [(24, 8), (22, 8), (22, 192), (9, 1)], ids=str)
@pytest.mark.parametrize("alive_share", [1.0, 0.5])
@pytest.mark.parametrize("seed", range(4))
def test_woodfisher__scores_order_and_weights_are_the_formula(
    numel: int, size: int, alive_share: float, seed: int
) -> None:
    given = problem(seed, numel, alive_share)
    order = given.ordered(WoodFisher(block_size=size, damp=DAMP))
    expected = scores(given, size)
    assert sorted(order.indices.tolist()) == list(range(numel))
    torch.testing.assert_close(order.losses, expected[order.indices.long()], rtol=1e-5, atol=1e-12)
    assert order.losses.tolist() == pytest.approx(expected.sort().values.tolist(), rel=1e-5)
    for count in range(order.zeros, numel + 1):
        fallen = order.indices[:count].tolist()
        weight = order.weight(given.weight, count).reshape(-1).double()
        torch.testing.assert_close(weight, all_at_once(given, size, fallen), rtol=1e-4, atol=1e-5)
        assert int((weight == 0).sum()) == count


@pytest.mark.parametrize("alive_share", [1.0, 0.6])
@pytest.mark.parametrize("seed", range(4))
def test_woodfisher__of_each_four_the_two_of_least_score_fall(alive_share: float, seed: int) -> None:
    given = problem(seed, 24, alive_share)
    order = given.ordered(WoodFisher(block_size=8, damp=DAMP, pattern="2:4"))
    score = scores(given, 8)
    expected = set()
    for first in range(0, 24, 4):
        group = sorted(range(first, first + 4), key=lambda j: (bool(given.alive[j]), float(score[j])))
        dead = sum(not given.alive[j] for j in group)
        expected |= set(group[: max(2, dead)])
    assert set(order.indices.tolist()) == expected
    weight = order.weight(given.weight, len(expected)).reshape(-1).double()
    torch.testing.assert_close(weight, all_at_once(given, 8, sorted(expected)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("alive_share", [1.0, 0.6])
@pytest.mark.parametrize("seed", range(4))
def test_woodfisher__blocks_of_four_fall_by_the_sum_of_their_scores(alive_share: float, seed: int) -> None:
    given = problem(seed, 24, alive_share, unit=4)
    order = given.ordered(WoodFisher(block_size=8, damp=DAMP, pattern="1x4"))
    sums = scores(given, 8).reshape(-1, 4).sum(1)
    blocks = order.indices.reshape(-1, 4)
    assert torch.equal(blocks % 4, torch.arange(4, dtype=torch.int32).expand_as(blocks))
    ranked = sums[(blocks[:, 0] // 4).long()]
    assert (ranked.diff() >= 0).all()
    torch.testing.assert_close(order.losses, ranked.repeat_interleave(4), rtol=1e-5, atol=1e-12)
    for count in range(order.zeros, 25, 4):
        weight = order.weight(given.weight, count).reshape(-1).double()
        expected = all_at_once(given, 8, order.indices[:count].tolist())
        torch.testing.assert_close(weight, expected, rtol=1e-4, atol=1e-5)


def test_woodfisher__it_is_not_ovit_where_weights_are_correlated_and_is_where_they_are_not() -> None:
    given = problem(3, 24, 1.0)
    apart = [given.ordered(kind(block_size=1, damp=DAMP)) for kind in (WoodFisher, OViT)]
    assert torch.equal(apart[0].indices, apart[1].indices)
    torch.testing.assert_close(apart[0].losses, apart[1].losses)
    woodfisher, ovit = (given.ordered(kind(block_size=24, damp=DAMP)) for kind in (WoodFisher, OViT))
    assert not torch.equal(woodfisher.indices, ovit.indices)
    first, second = (order.weight(given.weight, 1) for order in (woodfisher, ovit))
    torch.testing.assert_close(first, second, rtol=1e-5, atol=1e-6)  # of a single weight they are one


def test_woodfisher__how_many_blocks_are_worked_on_at_a_time_changes_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    given = problem(0, 60, 0.8)
    pruner = WoodFisher(block_size=8, damp=DAMP)
    together = given.ordered(pruner)
    monkeypatch.setitem(second_order._WORKING, "cpu", 3 * 8 * 8)
    apart = given.ordered(pruner)
    assert torch.equal(together.indices, apart.indices)
    torch.testing.assert_close(together.weight(given.weight, 30), apart.weight(given.weight, 30))
