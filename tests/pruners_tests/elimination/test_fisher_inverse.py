"""Inverses of Fisher blocks: damped, without what is dead, and what becomes of singular ones."""

from __future__ import annotations

import pytest
import torch
from helpers import lone_layer
from torch import Tensor

from pruners import InputError, MaskSet, create_pruner
from pruners.elimination.fisher import BlockFisher
from pruners.methods.registry import SECOND_ORDER

LAYERS = [lone_layer(5, 7, name="a.weight"), lone_layer(20, 30, name="b.weight")]
SIZES = {"compiled": 8, "LAPACK": 300}  # larger than what is compiled
every_size = pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
METHODS = sorted(SECOND_ORDER)


def filled(count: int, size: int, scale: float = 1.0, **options: object) -> BlockFisher:
    fisher = BlockFisher(LAYERS, block_size=size, **{"damp": 0.02, **options})
    random = torch.Generator().manual_seed(0)
    for _ in range(count):
        fisher.add({layer.name: scale * torch.randn(layer.shape, generator=random) for layer in LAYERS})
    fisher.flush()
    return fisher


def all_slots(fisher: BlockFisher) -> tuple[Tensor, Tensor]:
    size = fisher.block_size("b.weight")
    slots = torch.arange(size).repeat(600 // size, 1)
    return slots, torch.ones_like(slots, dtype=torch.bool)


@every_size
def test_fisher_inverse__it_is_that_of_the_mean_with_damp(size: int) -> None:
    fisher = filled(400, size)
    slots, alive = all_slots(fisher)
    inverse = fisher.inverse("b.weight", slice(0, len(slots)), slots, alive)
    mean = fisher.total("b.weight").double() / 400
    expected = torch.linalg.inv(mean + 0.02 * torch.eye(size, dtype=torch.float64))
    assert inverse.dtype == torch.float64
    torch.testing.assert_close(inverse, expected, rtol=1e-8, atol=1e-8)
    last = fisher.inverse("b.weight", slice(1, 2), slots[:1], alive[:1])
    torch.testing.assert_close(last, inverse[1:2], rtol=1e-12, atol=1e-12)


@every_size
def test_fisher_inverse__the_dead_stand_alone(size: int) -> None:
    fisher = filled(50, size)
    slots, alive = all_slots(fisher)
    dead = [0, 3, size - 1]
    alive[0, dead] = False
    inverse = fisher.inverse("b.weight", slice(0, len(slots)), slots, alive)
    kept = [place for place in range(size) if place not in dead]
    mean = fisher.total("b.weight", slice(0, 1))[0].double() / 50
    expected = torch.linalg.inv((mean + 0.02 * torch.eye(size, dtype=torch.float64))[kept][:, kept])
    torch.testing.assert_close(inverse[0][kept][:, kept], expected, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(inverse[0][dead][:, dead], 50 * torch.eye(3, dtype=torch.float64))
    assert not inverse[0][dead][:, kept].any()


@every_size
def test_fisher_inverse__only_the_slots_that_are_asked_for(size: int) -> None:
    fisher = filled(50, size)
    slots = torch.tensor([[1, 2, 5, 7], [0, 3, 4, 6]])
    alive = torch.tensor([[True, True, True, True], [True, False, True, True]])
    inverse = fisher.inverse("b.weight", slice(0, 2), slots, alive)
    whole = fisher.total("b.weight", slice(0, 2)).double() / 50
    for block in range(2):
        living = slots[block][alive[block]]
        expected = torch.linalg.inv(
            whole[block][living][:, living] + 0.02 * torch.eye(len(living), dtype=torch.float64)
        )
        chosen = inverse[block][alive[block]][:, alive[block]]
        torch.testing.assert_close(chosen, expected, rtol=1e-8, atol=1e-8)


@every_size
def test_fisher_inverse__slots_may_come_in_any_order_that_puts_the_living_first(size: int) -> None:
    fisher = filled(50, size)
    _, alive = all_slots(fisher)
    alive[0, [0, 3, size - 2]] = False
    slots = (~alive).byte().argsort(dim=1, stable=True)
    alive = alive.gather(1, slots)
    inverse = fisher.inverse("b.weight", slice(0, len(slots)), slots, alive)
    whole = fisher.total("b.weight").double() / 50 + 0.02 * torch.eye(size, dtype=torch.float64)
    for block in range(len(slots)):
        living = slots[block][alive[block]]
        expected = torch.linalg.inv(whole[block][living][:, living])
        count = len(living)
        torch.testing.assert_close(inverse[block, :count, :count], expected, rtol=1e-8, atol=1e-8)
        alone = 50 * torch.eye(size - count, dtype=torch.float64)
        torch.testing.assert_close(inverse[block, count:, count:], alone)


@every_size
def test_fisher_inverse__a_singular_fisher_is_held_by_the_damp_alone(size: int) -> None:
    fisher = filled(2, size, damp=1e-8)  # two directions of many are known
    slots, alive = all_slots(fisher)
    inverse = fisher.inverse("b.weight", slice(0, len(slots)), slots, alive)
    assert torch.isfinite(inverse).all()
    assert (inverse.diagonal(dim1=1, dim2=2) > 0).all()


@every_size
def test_fisher_inverse__sums_whose_rounding_exceeds_the_damp_are_damped_at_that_level(size: int) -> None:
    """In float32 a sum of one gradient is not quite of rank 1: without more than λ it may be indefinite."""
    fisher = filled(1, size, scale=1e3, damp=1e-12)
    slots, alive = all_slots(fisher)
    blocks = fisher.blocks("b.weight", slice(0, len(slots)), slots, alive)
    assert (torch.linalg.eigvalsh(blocks) < 0).any()
    inverse = fisher.inverse("b.weight", slice(0, len(slots)), slots, alive)
    assert torch.isfinite(inverse).all()
    assert (torch.linalg.eigvalsh(inverse) > -1e-9 * inverse.abs().amax((1, 2)).unsqueeze(1)).all()


@every_size
def test_fisher_inverse__a_fisher_without_gradients_is_refused(size: int) -> None:
    fisher = BlockFisher(LAYERS, block_size=size)
    fisher.flush()
    slots, alive = all_slots(fisher)
    with pytest.raises(InputError, match="gradients = 0: at least one gradient"):
        fisher.inverse("b.weight", slice(0, len(slots)), slots, alive)
    with pytest.raises(InputError, match="at least one gradient"):
        fisher.damping("b.weight")


@every_size
@pytest.mark.parametrize("broken", [-1.0, torch.nan, torch.inf])
def test_fisher_inverse__a_block_that_is_not_positive_definite_is_refused(broken: float, size: int) -> None:
    fisher = filled(50, size)
    fisher.sums["b.weight"][0][0].fill_(broken)
    slots, alive = all_slots(fisher)
    with pytest.raises(InputError, match=r"damp = 0\.02.*b\.weight is not positive definite"):
        fisher.inverse("b.weight", slice(0, len(slots)), slots, alive)


@every_size
@pytest.mark.parametrize("relative", [False, True])
def test_fisher_inverse__a_layer_without_gradients_gets_the_inverse_of_the_damp(
    relative: bool, size: int
) -> None:
    fisher = BlockFisher(LAYERS, block_size=size, damp=1e-8, relative=relative)
    fisher.add({layer.name: torch.zeros(layer.shape) for layer in LAYERS})
    fisher.flush()
    slots, alive = all_slots(fisher)
    inverse = fisher.inverse("b.weight", slice(0, len(slots)), slots, alive)
    alone = 1 / fisher.damping("b.weight")
    assert 0 < alone < torch.inf
    torch.testing.assert_close(inverse, (alone * torch.eye(size, dtype=torch.float64)).expand_as(inverse))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("relative", [False, True])
def test_fisher_inverse__a_layer_of_zero_gradients_gives_finite_weights_and_falls_first(
    method: str, relative: bool
) -> None:
    """Dead inputs: the other layer's weights count for more, whatever their size."""
    random = torch.Generator().manual_seed(0)
    weights = {layer.name: torch.randn(layer.shape, generator=random) for layer in LAYERS}
    masks = MaskSet({name: torch.ones_like(weight, dtype=torch.bool) for name, weight in weights.items()})
    pruner = create_pruner(method, block_size=16, damp=1e-6, relative=relative)
    fisher = pruner.fisher(LAYERS)
    assert fisher is not None
    for _ in range(40):
        gradient = torch.randn(LAYERS[1].shape, generator=random)
        fisher.add({"a.weight": torch.zeros(LAYERS[0].shape), "b.weight": gradient})
    order = pruner.order(weights, LAYERS, masks, fisher)
    for layer in LAYERS:
        assert torch.isfinite(order[layer.name].losses).all()
        for count in (1, layer.numel // 2, layer.numel - 1):
            assert torch.isfinite(order[layer.name].weight(weights[layer.name], count)).all()
    if method != "dimap+ovit":  # whose allocation is DIMAP's
        assert order.losses["a.weight"].max() < order.losses["b.weight"].quantile(0.2)
