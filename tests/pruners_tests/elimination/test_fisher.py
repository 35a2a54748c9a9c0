"""The block Fisher against the explicit sum of outer products."""

from __future__ import annotations

import pytest
import torch
from helpers import lone_layer, quick
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from pruners import InputError, Pattern
from pruners.elimination.fisher import BlockFisher, to_blocks

LAYERS = [
    lone_layer(25, 7, name="a.weight", module="QKV"),  # 175 weights
    lone_layer(2, 3, name="b.weight"),
]


def gradients(count: int, seed: int = 0) -> list[dict[str, Tensor]]:
    random = torch.Generator().manual_seed(seed)
    return [
        {layer.name: torch.randn(layer.shape, generator=random) for layer in LAYERS} for _ in range(count)
    ]


def filled(count: int, block_size: int | dict[str, int] = 8, **options: object) -> BlockFisher:
    fisher = BlockFisher(LAYERS, block_size=block_size, **{"damp": 0.01, **options})
    for gradient in gradients(count):
        fisher.add(gradient)
    fisher.flush()
    return fisher


def outer_products(count: int, name: str, size: int) -> Tensor:
    """Σ g gᵀ in float64, block by block; padding is 0."""
    rows = torch.stack([gradient[name].double().reshape(-1) for gradient in gradients(count)])
    whole = sum(torch.outer(row, row) for row in rows)
    assert isinstance(whole, Tensor)
    numel = len(whole)
    result = torch.zeros(-(-numel // size), size, size, dtype=torch.float64)
    for number, start in enumerate(range(0, numel, size)):
        end = min(start + size, numel)
        result[number, : end - start, : end - start] = whole[start:end, start:end]
    return result


@pytest.mark.parametrize("block_size", [1, 5, 8, 25, 63, 64, 65, 100, 175, 192])  # halved from 64 on
@pytest.mark.parametrize("count", [1, 7, 200])  # less than wait for a product, and more
def test_fisher__sums_are_the_outer_products(block_size: int, count: int) -> None:
    fisher = filled(count, block_size)
    assert fisher.count == count
    for layer in LAYERS:
        size = min(block_size, layer.numel)
        assert fisher.block_size(layer.name) == size
        expected = outer_products(count, layer.name, size)
        torch.testing.assert_close(fisher.total(layer.name).double(), expected, rtol=1e-5, atol=1e-4)
        first_block = fisher.total(layer.name, slice(0, 1))
        assert torch.equal(first_block, fisher.total(layer.name)[:1])


def test_fisher__large_blocks_are_kept_by_three_quarters() -> None:
    fisher = filled(3, {"QKV": 64, "MLP": 6})
    assert sum(part.numel() for part in fisher.sums["a.weight"]) == 3 * 64 * 64 * 3 // 4
    assert sum(part.numel() for part in fisher.sums["b.weight"]) == 36


@given(cuts=st.lists(st.integers(1, 9), min_size=1, max_size=6))
@quick(25)
def test_fisher__gradients_one_by_one_or_many_at_once(cuts: list[int]) -> None:
    every = gradients(sum(cuts))
    single, many = (BlockFisher(LAYERS, block_size=7) for _ in range(2))
    for gradient in every:
        single.add(gradient)
    start = 0
    for cut in cuts:
        chunk = every[start : start + cut]
        many.add_many({layer.name: torch.stack([g[layer.name] for g in chunk]) for layer in LAYERS})
        start += cut
    single.flush()
    many.flush()
    assert single.count == many.count == len(every)
    for layer in LAYERS:
        assert torch.equal(single.total(layer.name), many.total(layer.name))


def test_fisher__more_gradients_after_a_flush() -> None:
    fisher = BlockFisher(LAYERS, block_size=8)
    for number, gradient in enumerate(gradients(20)):
        fisher.add(gradient)
        if number in (0, 4, 13):
            fisher.flush()
    fisher.flush()
    expected = outer_products(20, "a.weight", 8)
    torch.testing.assert_close(fisher.total("a.weight").double(), expected, rtol=1e-5, atol=1e-4)


def test_fisher__each_module_has_its_block_size() -> None:
    fisher = filled(9, {"QKV": 70, "MLP": 2})
    assert [fisher.block_size(layer.name) for layer in LAYERS] == [70, 2]
    for layer, size in zip(LAYERS, (70, 2), strict=True):
        expected = outer_products(9, layer.name, size)
        torch.testing.assert_close(fisher.total(layer.name).double(), expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(
    ("block_size", "message"),
    [
        (0, "block_size = 0: must"),
        (-1, "block_size = -1: must"),
        (40000, "block_size = 40000: must"),
        ({"QKV": 8, "MLP": 0}, "block_size = 0: must"),
        ({"QKV": 8}, "block_size = .*needs a size for MLP too"),
        ({"MPL": 8, "QKV": 3}, r"needs a size for MLP too \(did you mean 'MPL'\?\)"),
    ],
)
def test_fisher__block_sizes_that_cannot_be_are_named(block_size: int | dict[str, int], message: str) -> None:
    with pytest.raises(InputError, match=message):
        BlockFisher(LAYERS, block_size=block_size)


@pytest.mark.parametrize("damp", [0.0, -1e-8, float("nan"), float("inf")])
def test_fisher__a_damp_that_is_not_positive_is_named(damp: float) -> None:
    with pytest.raises(InputError, match="damp = "):
        BlockFisher(LAYERS, damp=damp)


def test_fisher__blocks_hold_whole_groups_of_a_pattern() -> None:
    layers = [lone_layer(4, 16, name="a.weight"), lone_layer(1, 8, name="b.weight")]
    fisher = BlockFisher(layers, block_size=10, pattern=Pattern.parse("2:4"))
    assert [fisher.block_size(layer.name) for layer in layers] == [12, 8]


def test_fisher__a_convolution_is_read_with_its_inputs_last_where_a_pattern_needs_it() -> None:
    layer = lone_layer(2, 4, 3)
    gradient = torch.arange(24.0).reshape(layer.shape)
    fisher = BlockFisher([layer], block_size=4, pattern=Pattern.parse("2:4"))
    fisher.add({layer.name: gradient})
    fisher.flush()
    row = gradient[0, :, 1]  # the second block: output 0, kernel position 1
    assert torch.equal(fisher.total(layer.name)[1], torch.outer(row, row))


def test_fisher__relative_damp_is_a_share_of_the_mean_of_the_living_diagonal() -> None:
    fisher = filled(30, 8, damp=0.1, relative=True)
    for layer in LAYERS:
        diagonal = outer_products(30, layer.name, min(8, layer.numel)).diagonal(dim1=1, dim2=2)
        mean = float(diagonal.reshape(-1)[: layer.numel].mean()) / 30  # without the padding
        assert fisher.damping(layer.name) == pytest.approx(0.1 * mean, rel=1e-5)
    assert filled(30, 8, damp=0.1).damping("a.weight") == 0.1


def test_fisher__sums_in_float64_are_exact_where_float32_rounds() -> None:
    double, single = filled(200, 64, dtype=torch.float64), filled(200, 64)
    expected = outer_products(200, "a.weight", 64)
    assert double.total("a.weight").dtype == torch.float64
    torch.testing.assert_close(double.total("a.weight"), expected, rtol=1e-12, atol=1e-12)
    assert (single.total("a.weight").double() - expected).abs().max() > 1e-9


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("bad", [0, 2, 140])
def test_fisher__a_bad_gradient_names_layer_and_batch(value: float, bad: int) -> None:
    every = gradients(bad + 2)
    every[bad]["b.weight"][1, 2] = value
    fisher = BlockFisher(LAYERS, block_size=8)

    def take() -> None:
        for gradient in every:
            fisher.add(gradient)
        fisher.flush()

    with pytest.raises(InputError, match=rf"gradient = 'b\.weight': has NaN or Inf in batch {bad}$"):
        take()


def test_fisher__squares_that_overflow_are_named() -> None:
    fisher = BlockFisher(LAYERS, block_size=8)
    fisher.add({layer.name: torch.full(layer.shape, 1e30) for layer in LAYERS})
    with pytest.raises(InputError, match=r"a\.weight.*squares overflow torch.float32 by batch 1"):
        fisher.flush()
    double = BlockFisher(LAYERS, block_size=8, dtype=torch.float64)
    double.add({layer.name: torch.full(layer.shape, 1e30) for layer in LAYERS})
    double.flush()
    assert float(double.total("b.weight")[0, 0, 0]) == pytest.approx(1e60)


def test_fisher__a_layer_that_is_done_with_gives_its_memory_back() -> None:
    fisher = filled(3)
    fisher.discard("a.weight")
    fisher.discard("a.weight")
    assert set(fisher.sums) == {"b.weight"}


@given(numel=st.integers(1, 40), size=st.integers(1, 50), boolean=st.booleans())
@quick(50)
def test_fisher__blocks_are_the_flat_tensor_padded_with_zeros(numel: int, size: int, boolean: bool) -> None:
    flat = torch.ones(numel, dtype=torch.bool) if boolean else torch.arange(1.0, numel + 1)
    blocks = to_blocks(flat, size)
    assert blocks.shape == (-(-numel // size), size)
    assert torch.equal(blocks.reshape(-1)[:numel], flat)
    assert not blocks.reshape(-1)[numel:].any()
    assert len(blocks.reshape(-1)) - numel < size
