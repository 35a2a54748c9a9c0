"""The block Fisher against the explicit sum of outer products and an explicit inverse."""

from __future__ import annotations

import pytest
import torch
from helpers import lone_layer, quick
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from pruners import InputError
from pruners.fisher import BlockFisher, to_blocks

LAYERS = [lone_layer(5, 7, name="a.weight"), lone_layer(2, 3, name="b.weight")]  # 35 and 6 weights


def gradients(count: int, seed: int = 0) -> list[dict[str, Tensor]]:
    random = torch.Generator().manual_seed(seed)
    return [
        {layer.name: torch.randn(layer.shape, generator=random) for layer in LAYERS} for _ in range(count)
    ]


def filled(count: int, block_size: int = 8, damp: float = 0.01, chunk: int = 32) -> BlockFisher:
    fisher = BlockFisher(LAYERS, block_size=block_size, damp=damp, chunk=chunk)
    for gradient in gradients(count):
        fisher.add(gradient)
    fisher.flush()
    return fisher


def outer_products(count: int, name: str, block_size: int) -> Tensor:
    """Σ g gᵀ of the whole layer in float64, cut to diagonal blocks one number at a time; padding is 0."""
    whole = sum(
        torch.outer(g[name].double().reshape(-1), g[name].double().reshape(-1)) for g in gradients(count)
    )
    assert isinstance(whole, Tensor)
    numel = len(whole)
    size = min(block_size, numel)
    result = torch.zeros(-(-numel // size), size, size, dtype=torch.float64)
    for i in range(numel):
        for j in range(numel):
            if i // size == j // size:
                result[i // size, i % size, j % size] = whole[i, j]
    return result


@pytest.mark.parametrize(
    "block_size", [1, 5, 8, 192]
)  # each weight alone, dividing, padded, larger than the layer
@pytest.mark.parametrize(("count", "chunk"), [(7, 1), (7, 3), (7, 32), (64, 32)])
def test_sums_are_the_outer_products_whatever_the_chunk(block_size: int, count: int, chunk: int) -> None:
    fisher = filled(count, block_size, chunk=chunk)
    assert fisher.count == count
    for layer in LAYERS:
        expected = outer_products(count, layer.name, block_size)
        assert fisher.block_size(layer.name) == min(block_size, layer.numel)
        torch.testing.assert_close(fisher.sums[layer.name].double(), expected, rtol=1e-5, atol=1e-4)


def test_the_inverse_is_that_of_the_mean_with_damp() -> None:
    fisher = filled(50, damp=0.02)
    alive = to_blocks(torch.ones(35, dtype=torch.bool), 8)
    found = fisher.inverse("a.weight", slice(0, 4), alive[:4])
    mean = outer_products(50, "a.weight", 8)[:4] / 50
    expected = torch.linalg.inv(mean + 0.02 * torch.eye(8, dtype=torch.float64))
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(fisher.inverse("a.weight", slice(2, 4), alive[2:4]), found[2:])


def test_dead_weights_and_padding_stand_alone_in_the_inverse() -> None:
    fisher = filled(50, damp=0.02)
    alive = to_blocks(torch.ones(35, dtype=torch.bool), 8)
    alive[0, 3] = False
    found = fisher.inverse("a.weight", slice(0, 5), alive)
    kept = [0, 1, 2, 4, 5, 6, 7]
    mean = outer_products(50, "a.weight", 8) / 50
    expected = torch.linalg.inv(mean[0][kept][:, kept] + 0.02 * torch.eye(7, dtype=torch.float64))
    torch.testing.assert_close(found[0][kept][:, kept], expected, rtol=1e-4, atol=1e-5)
    assert found[0, 3].tolist() == pytest.approx([0, 0, 0, 50, 0, 0, 0, 0])
    torch.testing.assert_close(found[4, 3:, 3:], 50 * torch.eye(5, dtype=torch.float64))  # 35 = 4·8 + 3
    assert (found[4, :3, 3:] == 0).all()


def test_a_layer_without_gradients_gets_the_inverse_of_damp() -> None:
    fisher = BlockFisher(LAYERS, block_size=8, damp=1e-8)
    fisher.add({layer.name: torch.zeros(layer.shape) for layer in LAYERS})
    fisher.flush()
    found = fisher.inverse("b.weight", slice(0, 1), torch.ones(1, 6, dtype=torch.bool))
    torch.testing.assert_close(found[0], 1e8 * torch.eye(6, dtype=torch.float64))


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_bad_gradient_names_layer_and_batch_and_is_not_taken(value: float) -> None:
    fisher = BlockFisher(LAYERS, block_size=8, damp=0.01)
    good = gradients(3)
    fisher.add(good[0])
    fisher.add(good[1])
    bad = {name: gradient.clone() for name, gradient in good[2].items()}
    bad["b.weight"][1, 2] = value
    with pytest.raises(InputError, match=r"b\.weight.*NaN or Inf in batch 2"):
        fisher.add(bad)
    fisher.add(good[2])  # nothing of the refused one is left in any layer
    fisher.flush()
    assert fisher.count == 3
    for layer in LAYERS:
        assert torch.equal(fisher.sums[layer.name], filled(3).sums[layer.name])


@pytest.mark.parametrize(("block_size", "damp"), [(0, 0.1), (-1, 0.1), (8, 0.0), (8, -1e-8)])
def test_options_out_of_range_are_named(block_size: int, damp: float) -> None:
    with pytest.raises(InputError, match="block_size" if block_size < 1 else "damp"):
        BlockFisher(LAYERS, block_size=block_size, damp=damp)


def test_a_fisher_without_gradients_is_refused() -> None:
    fisher = BlockFisher(LAYERS, block_size=8, damp=0.1)
    fisher.flush()
    with pytest.raises(InputError, match="at least one gradient"):
        fisher.inverse("b.weight", slice(0, 1), torch.ones(1, 6, dtype=torch.bool))


@pytest.mark.parametrize(
    "broken", [-torch.eye(6), torch.full((6, 6), torch.nan), torch.inf * torch.ones(6, 6)]
)
def test_a_fisher_that_is_not_positive_definite_is_refused(broken: Tensor) -> None:
    fisher = filled(50)
    fisher.sums["b.weight"][0] = 50 * broken
    with pytest.raises(InputError, match=r"damp = 0\.01.*b\.weight is not positive definite"):
        fisher.inverse("b.weight", slice(0, 1), torch.ones(1, 6, dtype=torch.bool))


def test_gradients_whose_squares_overflow_are_refused() -> None:
    fisher = BlockFisher(LAYERS, block_size=1, damp=0.01)
    fisher.add({layer.name: torch.full(layer.shape, 1e30) for layer in LAYERS})
    fisher.flush()
    with pytest.raises(InputError, match="not positive definite"):
        fisher.inverse("b.weight", slice(0, 6), torch.ones(6, 1, dtype=torch.bool))


@given(numel=st.integers(1, 40), size=st.integers(1, 50), boolean=st.booleans())
@quick(50)
def test_blocks_are_the_flat_tensor_padded_with_zeros(numel: int, size: int, boolean: bool) -> None:
    flat = torch.ones(numel, dtype=torch.bool) if boolean else torch.arange(1.0, numel + 1)
    blocks = to_blocks(flat, size)
    assert blocks.shape == (-(-numel // size), size)
    assert torch.equal(blocks.reshape(-1)[:numel], flat)
    assert not blocks.reshape(-1)[numel:].any()
    assert len(blocks.reshape(-1)) - numel < size
