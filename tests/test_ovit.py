"""oViT over a layer: blocks, padding, zeros and the cumulative losses against a brute force in float64."""

from __future__ import annotations

import pytest
import torch
from helpers import lone_layer, quick
from hypothesis import given
from hypothesis import strategies as st
from test_obs import surgeon
from torch import Tensor

import pruners.ovit
from pruners import InputError, PrunableLayer
from pruners.order import LayerOrder
from pruners.ovit import OViT

DAMP = 0.05


def problem(
    seed: int, numel: int, alive_share: float
) -> tuple[PrunableLayer, Tensor, Tensor, list[dict[str, Tensor]]]:
    """A layer, its weights, its mask, and correlated gradients."""
    random = torch.Generator().manual_seed(seed)
    layer = lone_layer(1, numel)
    weight = torch.randn(layer.shape, generator=random)
    mask = torch.rand(layer.shape, generator=random) < alive_share
    common = torch.randn(20, 1, 1, generator=random)
    gradients = torch.randn(20, 1, numel, generator=random) + common
    return layer, weight, mask, [{layer.name: gradient} for gradient in gradients]


def ordered(
    pruner: OViT, layer: PrunableLayer, weight: Tensor, mask: Tensor, gradients: list[dict[str, Tensor]]
) -> LayerOrder:
    fisher = pruner.fisher([layer])
    for gradient in gradients:
        fisher.add(gradient)
    return pruner.order({layer.name: weight}, [layer], {layer.name: mask}, fisher)[layer.name]


def by_brute_force(
    weight: Tensor, mask: Tensor, gradients: list[dict[str, Tensor]], size: int
) -> tuple[list[float], list[Tensor]]:
    """Losses and weights at every count: a surgeon for each block, their steps merged by cumulative loss."""
    flat = torch.where(mask, weight, 0.0).reshape(-1).double()
    rows = torch.stack([g.reshape(-1).double() for gradient in gradients for g in gradient.values()])
    f = rows.T @ rows / len(rows) + DAMP * torch.eye(len(flat), dtype=torch.float64)
    steps = []
    for start in range(0, len(flat), size):
        block = slice(start, start + size)
        done = surgeon(flat[block], f[block, block], mask.reshape(-1)[block])
        steps += [(loss, block, after) for loss, after in zip(done.losses, done.weights[1:], strict=True)]
    zeros = int((~mask).sum())
    losses, states = [0.0] * zeros, [flat.clone() for _ in range(zeros + 1)]
    for loss, block, after in sorted(steps, key=lambda step: step[0]):
        losses.append(loss)
        states.append(states[-1].clone())
        states[-1][block] = after
    return losses, states


@pytest.mark.parametrize(
    ("numel", "size"), [(24, 8), (22, 8), (22, 192), (9, 1), (1, 4)], ids=str
)  # dividing, last block padded, block larger than the layer, no correlations, one weight
@pytest.mark.parametrize("alive_share", [1.0, 0.5])
@pytest.mark.parametrize("seed", range(4))
def test_losses_and_weights_at_every_count(numel: int, size: int, alive_share: float, seed: int) -> None:
    layer, weight, mask, gradients = problem(seed, numel, alive_share)
    order = ordered(OViT(block_size=size, damp=DAMP), layer, weight, mask, gradients)
    losses, states = by_brute_force(weight, mask, gradients, min(size, numel))
    assert order.losses.tolist() == pytest.approx(losses, rel=1e-4, abs=1e-9)
    assert sorted(order.indices.tolist()) == list(range(numel))
    assert order.zeros == int((~mask).sum())
    for count in range(order.zeros, numel + 1):
        found = order.weight(weight, count).reshape(-1).double()
        torch.testing.assert_close(found, states[count], rtol=1e-4, atol=1e-5)
        assert int((found == 0).sum()) == count


def test_how_many_blocks_are_worked_on_at_a_time_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    problem_ = problem(0, 60, 0.8)
    pruner = OViT(block_size=8, damp=DAMP)
    together = ordered(pruner, *problem_)
    monkeypatch.setattr(pruners.ovit, "_WORKING_NUMBERS", 3 * 2 * 8 * 8)  # three blocks, then three, then two
    apart = ordered(pruner, *problem_)
    assert torch.equal(together.indices, apart.indices)
    torch.testing.assert_close(together.losses, apart.losses)
    weight = problem_[1]
    torch.testing.assert_close(together.weight(weight, 30), apart.weight(weight, 30))


def test_dead_weights_fall_first_the_pruned_before_other_zeros() -> None:
    layer, weight, mask, gradients = problem(0, 12, 1.0)
    mask[0, [3, 7]] = False  # pruned, though their weights have drifted from zero
    weight[0, [1, 9]] = 0.0  # zero, though not pruned
    order = ordered(OViT(block_size=5, damp=DAMP), layer, weight, mask, gradients)
    assert order.indices[:4].tolist() == [3, 7, 1, 9]
    assert order.losses[:4].tolist() == [0, 0, 0, 0]
    assert (order.losses[4:] > 0).all()
    assert order.zeros == 4


@given(scale=st.sampled_from([0.0, 1e-6, 1e-3]), count=st.integers(0, 30), seed=st.integers(0, 99))
@quick(40)
def test_a_singular_fisher_gives_finite_weights(scale: float, count: int, seed: int) -> None:
    """Dead inputs, or none of the gradients' directions known: λ = 1e-8 alone holds the block together."""
    layer, weight, mask, gradients = problem(seed, 30, 0.8)
    small = [{name: g * scale for name, g in gradient.items()} for gradient in gradients[:2]]
    order = ordered(OViT(block_size=8, damp=1e-8), layer, weight, mask, small)
    assert torch.isfinite(order.losses).all()
    assert (order.losses.diff() >= 0).all()
    assert torch.isfinite(order.weight(weight, count)).all()


def test_what_is_missing_is_named() -> None:
    layer, weight, mask, _ = problem(0, 12, 1.0)
    with pytest.raises(InputError, match="fisher"):
        OViT().order({layer.name: weight}, [layer], {layer.name: mask}, None)
    with pytest.raises(InputError, match="at least one gradient"):
        ordered(OViT(), layer, weight, mask, [])
    with pytest.raises(InputError, match="block_size = 0"):
        OViT(block_size=0).fisher([layer])
    with pytest.raises(InputError, match="damp = -1"):
        OViT(damp=-1).fisher([layer])
