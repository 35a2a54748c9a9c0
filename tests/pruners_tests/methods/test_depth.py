"""Orders no deeper than they are asked for, and gone on with: the same as those of everything at once."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache

import pytest
import torch
from helpers import lone_layer, threads
from torch import Tensor

from pruners import EliminationOrder, PrunableLayer
from pruners.elimination.fisher import BlockFisher
from pruners.elimination.order import LayerOrder
from pruners.methods import second_order
from pruners.methods.ovit import DimapOViT, OViT
from pruners.methods.second_order import SecondOrder
from pruners.methods.woodfisher import WoodFisher

LAYERS = [lone_layer(40, 48, name="a.weight"), lone_layer(9, 28, name="b.weight", module="PRJ")]
PRUNERS: dict[str, SecondOrder] = {
    "ovit": OViT(block_size=48, damp=1e-4),
    "last block padded": OViT(block_size=50, damp=1e-4),
    "blocks of 17": OViT(block_size=17, damp=1e-4),
    "dimap+ovit": DimapOViT(block_size=48, damp=1e-4),
    "2:4": OViT(block_size=48, damp=1e-4, pattern="2:4"),
    "1x4": OViT(block_size=48, damp=1e-4, pattern="1x4"),
    "woodfisher": WoodFisher(block_size=48, damp=1e-4),
}
every_pruner = pytest.mark.parametrize("kind", PRUNERS)


@lru_cache
def problem(kind: str) -> tuple[dict[str, Tensor], dict[str, Tensor], BlockFisher]:
    """Weights, masks (a tenth is pruned; whole groups where these must be), and a correlated Fisher."""
    random = torch.Generator().manual_seed(0)
    weights, masks = {}, {}
    for layer in LAYERS:
        weights[layer.name] = torch.randn(layer.shape, generator=random)
        mask = torch.rand(layer.shape[0], layer.shape[1] // 4, generator=random) > 0.1
        masks[layer.name] = mask.repeat_interleave(4, 1)
    fisher = PRUNERS[kind].fisher(LAYERS)
    for _ in range(60):
        common = torch.randn(1, generator=random)
        fisher.add({layer.name: torch.randn(layer.shape, generator=random) + common for layer in LAYERS})
    fisher.flush()
    return weights, masks, fisher


def ordered(kind: str, depth: float, known: EliminationOrder | None = None) -> EliminationOrder:
    weights, masks, fisher = problem(kind)
    return PRUNERS[kind].order(weights, LAYERS, masks, fisher, depth=depth, known=known)


@pytest.fixture(autouse=True)
def _several_chunks(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Other blocks together each time: the fewer rows are left, the more of them."""
    monkeypatch.setitem(second_order._WORKING, "cpu", 8 * 48 * 48)
    with threads(2):
        yield


def assert_begins_as(partial: LayerOrder, whole: LayerOrder, rtol: float) -> None:
    """``partial`` is the beginning of ``whole``: where losses are not the same, so are the indices."""
    count, unit = len(partial.indices), partial.pattern.unit
    torch.testing.assert_close(partial.losses, whole.losses[:count], rtol=rtol, atol=0)
    losses = whole.losses[unit - 1 :: unit]
    apart = losses.diff() > 10 * rtol * losses[1:].abs()
    sure = torch.cat([apart.new_ones(1), apart]) & torch.cat([apart, apart.new_ones(1)])
    sure = sure.repeat_interleave(unit)[:count]
    assert sure[partial.zeros :].float().mean() > 0.9  # or this says nothing
    assert torch.equal(partial.indices[sure], whole.indices[:count][sure])


def reach(layer: PrunableLayer, depth: float) -> int:
    return -(-round(depth * 1000) * layer.numel // 1000)


@every_pruner
@pytest.mark.parametrize("depth", [0.02, 0.3, 0.45])
def test_depth__it_reaches_so_deep_and_begins_as_the_whole(kind: str, depth: float) -> None:
    whole, partial = ordered(kind, 1.0), ordered(kind, depth)
    for layer in LAYERS:
        order = partial[layer.name]
        assert len(order.indices) >= min(reach(layer, depth), len(whole[layer.name].indices))
        if kind != "woodfisher":  # where there is nothing to save
            assert len(order.indices) < 0.9 * len(whole[layer.name].indices) or depth > 0.4
        assert order.zeros == whole[layer.name].zeros
        assert_begins_as(order, whole[layer.name], 1e-6)
        if order.scores is not None:
            prices = whole[layer.name].scores
            assert prices is not None
            assert torch.equal(order.scores, prices[: len(order.scores)])
            assert len(order.scores) == len(order.indices)


@every_pruner
@pytest.mark.parametrize("depths", [(0.3,), (0.1, 0.3, 0.6), (0.02, 0.04, 0.5)], ids=str)
def test_depth__going_on_ends_as_the_whole(kind: str, depths: tuple[float, ...]) -> None:
    whole = ordered(kind, 1.0)
    known: EliminationOrder | None = None
    for depth in (*depths, 1.0):
        known = ordered(kind, depth, known)
    assert known is not None
    weights, _, _ = problem(kind)
    for layer in LAYERS:
        resumed, all_of_it = known[layer.name], whole[layer.name]
        assert len(resumed.indices) == len(all_of_it.indices)
        assert sorted(resumed.indices.tolist()) == sorted(all_of_it.indices.tolist())
        assert_begins_as(resumed, all_of_it, 1e-5)
        for share in (0.2, 0.5, 0.9):
            count = min(int(share * layer.numel) // 4 * 4, len(resumed.indices))
            assert torch.equal(resumed.mask(layer.shape, count), all_of_it.mask(layer.shape, count))
            survivors, expected = (each.weight(weights[layer.name], count) for each in (resumed, all_of_it))
            torch.testing.assert_close(survivors, expected, rtol=1e-4, atol=1e-5)


@every_pruner
def test_depth__weights_within_reach_are_those_of_the_whole(kind: str) -> None:
    weights, _, _ = problem(kind)
    whole, partial = ordered(kind, 1.0), ordered(kind, 0.3)
    for layer in LAYERS:
        for share in (0.1, 0.2, 0.3):
            count = int(share * layer.numel) // 4 * 4
            survivors, expected = (
                each[layer.name].weight(weights[layer.name], count) for each in (partial, whole)
            )
            torch.testing.assert_close(survivors, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("depth", [0.05, 0.3, 0.8])
def test_depth__few_passes_suffice_however_unlike_the_blocks_are(
    depth: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = lone_layer(300, 48)
    random = torch.Generator().manual_seed(0)
    weight = torch.randn(layer.shape, generator=random) * torch.logspace(-2, 2, 300).unsqueeze(1)
    pruner = OViT(block_size=48, damp=1e-4)
    fisher = pruner.fisher([layer])
    for _ in range(20):
        fisher.add({layer.name: torch.randn(layer.shape, generator=random)})
    passes = []
    real = OViT.extend
    monkeypatch.setattr(OViT, "extend", lambda *args: (passes.append(args[-1]), real(*args))[1])
    masks = {layer.name: torch.ones(layer.shape, dtype=torch.bool)}
    order = pruner.order({layer.name: weight}, [layer], masks, fisher, depth=depth)[layer.name]
    assert len(order.indices) >= depth * layer.numel
    assert len(passes) <= 4


def test_depth__to_go_no_deeper_than_is_known_gives_what_is_known() -> None:
    known = ordered("ovit", 0.5)
    again = ordered("ovit", 0.3, known)
    assert all(again[name].indices is known[name].indices for name in known)


def test_depth__one_thread_gives_the_same_as_two() -> None:
    weights, _, _ = problem("blocks of 17")
    parallel = ordered("blocks of 17", 1.0, ordered("blocks of 17", 0.3))
    with threads(1):
        serial = ordered("blocks of 17", 1.0, ordered("blocks of 17", 0.3))
        for name, order in serial.items():
            assert torch.equal(order.indices, parallel[name].indices)
            assert torch.equal(order.losses, parallel[name].losses)
    for name, order in serial.items():
        for count in (order.zeros, 100, 200):
            with threads(1):
                alone = order.weight(weights[name], count)
            assert torch.equal(alone, parallel[name].weight(weights[name], count))
