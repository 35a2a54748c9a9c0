"""A memory budget for the Fisher: in how many passes the work is done, and that they all end the same."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import lru_cache

import pytest
import torch
from helpers import batches, lone_layer, state, tiny_vit, uneven
from torch import Tensor, nn

from pruners import EliminationOrder, InputError, MaskSet, PruneReport, find_layers, prune
from pruners.elimination.fisher import BlockFisher
from pruners.elimination.memory import fisher_bytes, free_bytes, layer_groups
from pruners.methods.registry import SECOND_ORDER, create_pruner
from pruners.methods.second_order import SecondOrder
from pruners.order_builder import OrderBuilder, repeatable

METHODS = sorted(SECOND_ORDER)
SIZE = 32
LARGEST = fisher_bytes(lone_layer(32, 8), SIZE)  # of a tiny ViT's layers
LOSS = nn.functional.cross_entropy


def pruner_of(method: str, **options: object) -> SecondOrder:
    pruner = create_pruner(method, block_size=SIZE, damp=1e-4, **options)
    assert isinstance(pruner, SecondOrder)
    return pruner


def ordering(model: nn.Module, pruner: SecondOrder, memory: int | None) -> OrderBuilder:
    layers = find_layers(model)
    masks = MaskSet.dense(model, layers)
    return OrderBuilder(model, layers, masks, pruner, lambda: batches(4), LOSS, limit=4, memory=memory)


@lru_cache
def in_one_pass(method: str, **options: object) -> tuple[PruneReport, dict[str, tuple[bytes, bool]]]:
    model = tiny_vit()
    report = prune(model, pruner_of(method, **options), 0.5, batches=batches(4), memory=1 << 30)
    return report, state(model)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("share", [1.0, 3.3])
def test_memory__several_passes_end_as_one(method: str, share: float) -> None:
    report, expected = in_one_pass(method)
    model, memory = tiny_vit(), int(share * LARGEST)
    passes = ordering(model, pruner_of(method), memory).passes
    assert passes > 3
    reported: list[tuple[str, int, int]] = []
    result = prune(
        model,
        pruner_of(method),
        0.5,
        batches=batches(4),
        gradients=4,
        memory=memory,
        progress=lambda *what: reported.append(what),
    )
    assert result.masks.fingerprint() == report.masks.fingerprint()
    assert result.allocation == report.allocation
    assert state(model) == expected
    assert reported.count(("gradients", 4, 4)) == passes
    assert [done for what, done, _ in reported if what == "layers"].count(1) == passes


@pytest.mark.parametrize("options", [{"pattern": "2:4"}, {"pattern": "1x4"}, {"double": True}], ids=str)
def test_memory__so_they_do_with_a_pattern_or_double_sums(options: dict[str, object]) -> None:
    report, expected = in_one_pass("ovit", **options)
    model = tiny_vit()
    memory = (8 if "double" in options else 4) * LARGEST
    assert ordering(model, pruner_of("ovit", **options), memory).passes == 3
    result = prune(model, pruner_of("ovit", **options), 0.5, batches=batches(4), memory=memory)
    assert result.masks.fingerprint() == report.masks.fingerprint()
    assert state(model) == expected


def test_memory__an_order_of_several_passes_gives_the_weights_at_any_allocation() -> None:
    model = tiny_vit()
    single, many = (ordering(model, pruner_of("ovit"), memory) for memory in (1 << 30, LARGEST))
    whole, parts = single.order(), many.order()
    assert (single.passes, many.passes) == (1, 12)
    del many  # and with it what lay on disk
    for share in (0.1, 0.5, 0.9):
        counts = {layer.name: int(share * layer.numel) for layer in single.layers}
        new, masks = whole.weights_at(single.weights, counts)
        again_new, again_masks = parts.weights_at(single.weights, counts)
        assert masks.fingerprint() == again_masks.fingerprint()
        assert all(torch.equal(new[name], again_new[name]) for name in new)


@pytest.mark.parametrize("memory", [1 << 30, LARGEST])
def test_memory__the_order_of_one_damp_outlives_that_of_the_next(memory: int) -> None:
    work = ordering(tiny_vit(), pruner_of("ovit"), memory)
    counts = {layer.name: layer.numel // 2 for layer in work.layers}

    def weights(order: EliminationOrder) -> dict[str, Tensor]:
        return order.weights_at(work.weights, counts)[0]

    first = work.order(1e-3, last=False)
    before = {name: weight.clone() for name, weight in weights(first).items()}
    second = work.order(1e-6)
    assert any(not torch.equal(before[name], weight) for name, weight in weights(second).items())
    assert all(torch.equal(before[name], weight) for name, weight in weights(first).items())
    for damp, order in ((1e-3, first), (1e-6, second)):
        alone = ordering(tiny_vit(), replace(pruner_of("ovit"), damp=damp), 1 << 30).order()
        assert all(torch.equal(weights(alone)[name], one) for name, one in weights(order).items())


def test_memory__a_method_without_a_fisher_takes_no_pass() -> None:
    model = tiny_vit()
    layers = find_layers(model)
    masks = MaskSet.dense(model, layers)
    work = OrderBuilder(model, layers, masks, create_pruner("dimap"), lambda: iter(()), LOSS, memory=1)
    assert work.passes == 0
    assert set(work.order()) == {layer.name for layer in layers}


def test_memory__batches_that_can_be_read_once_are_refused_where_they_are_needed_again() -> None:
    model = uneven()
    before = state(model)
    with pytest.raises(
        InputError, match=r"memory: holds the Fisher in 12 parts only, and batches can be read"
    ):
        prune(model, pruner_of("ovit"), 0.5, batches=iter(batches(4)), memory=LARGEST)
    assert state(model) == before
    prune(model, pruner_of("ovit"), 0.5, batches=iter(batches(4)), memory=1 << 30)
    source = batches(2)
    assert repeatable(source, 3)() is source
    assert next(iter(repeatable(iter(source), 1)())) is source[0]


@pytest.mark.parametrize("method", METHODS)
def test_memory__a_budget_too_small_for_one_layer_names_it(method: str) -> None:
    model = uneven()
    before = state(model)
    need = rf"bytes are not enough for the Fisher of blocks\.0\.mlp\.fc1\.weight alone, which takes {LARGEST}"
    with pytest.raises(InputError, match=rf"memory = {LARGEST - 1}: {need}"):
        prune(model, pruner_of(method), 0.5, batches=batches(2), memory=LARGEST - 1)
    assert state(model) == before


def test_memory__groups_keep_the_order_and_fit() -> None:
    layers = [lone_layer(size, 64, name=f"{size}.weight") for size in (1, 2, 8, 3, 1, 5, 4)]
    sizes = {layer.name: 64 for layer in layers}
    budget = fisher_bytes(layers[2], 64)
    groups = layer_groups(layers, sizes, budget)
    assert [layer for group in groups for layer in group] == layers
    assert all(sum(fisher_bytes(layer, 64) for layer in group) <= budget for group in groups)
    assert [[layer.shape[0] for layer in group] for group in groups] == [[1, 2], [8], [3, 1], [5], [4]]
    assert fisher_bytes(layers[0], 64, 8) == 2 * fisher_bytes(layers[0], 64)
    assert layer_groups([], {}, 0) == []


def test_memory__what_is_free_is_some_share_of_the_machine() -> None:
    assert 0 < free_bytes(torch.device("cpu")) < 1 << 50


@pytest.fixture
def peak(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """The most bytes that any Fisher held, in sums and in gradients that wait, at any time."""
    most = [0]
    held: dict[int, int] = {}

    def measured(name: str) -> None:
        real = getattr(BlockFisher, name)

        def method(self: BlockFisher, *args: object) -> object:
            look(self)
            result = real(self, *args)
            look(self)
            return result

        monkeypatch.setattr(BlockFisher, name, method)

    def look(fisher: BlockFisher) -> None:
        sums = sum(part.nbytes for parts in fisher.sums.values() for part in parts)
        held[id(fisher)] = sums + sum(waiting.nbytes for waiting in fisher._buffers.values())
        most[0] = max(most[0], held[id(fisher)])

    for name in ("add_many", "_add_buffers", "flush", "discard"):
        measured(name)
    return most


def some_gradients(layers: Mapping[str, tuple[int, ...]], count: int) -> dict[str, Tensor]:
    return {name: torch.ones(count, *shape) for name, shape in layers.items()}


@pytest.mark.parametrize(
    ("size", "whole"),
    [(2, 48), (7, 42), (16, 48), (63, 126), (64, 128), (100, 200), (192, 384), (256, 512)],
)
def test_memory__sums_and_waiting_gradients_are_at_most_three_halves(
    size: int, whole: int, peak: list[int]
) -> None:
    layers = [lone_layer(3, whole, name="a.weight"), lone_layer(5, whole, name="b.weight")]
    fisher = BlockFisher(layers, block_size=size)
    for count in (1, 300, 5):
        fisher.add_many(some_gradients({layer.name: layer.shape for layer in layers}, count))
    fisher.flush()
    numel = sum(layer.numel for layer in layers)
    assert 0.75 * numel * size * 4 < peak[0] <= 1.5 * numel * size * 4
    assert peak[0] <= sum(fisher_bytes(layer, size) for layer in layers)


def test_memory__so_they_are_with_a_block_size_for_each_module(peak: list[int]) -> None:
    layers = [
        lone_layer(2, 192, name="a.weight", module="QKV"),
        lone_layer(30, 192, name="b.weight", module="MLP"),
        lone_layer(9, 7, name="c.weight", module="PRJ"),  # the last block is padded
    ]
    sizes = {"QKV": 192, "MLP": 4, "PRJ": 10}
    fisher = BlockFisher(layers, block_size=sizes)
    fisher.add_many(some_gradients({layer.name: layer.shape for layer in layers}, 200))
    fisher.flush()
    assert peak[0] <= 1.5 * 4 * (2 * 192 * 192 + 30 * 192 * 4 + 70 * 10)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("block_size", [1, 16, SIZE, 64, 192, {"QKV": 64, "PRJ": 8, "MLP": 3}], ids=str)
def test_memory__a_budget_is_kept(method: str, block_size: int | dict[str, int], peak: list[int]) -> None:
    model = tiny_vit()
    pruner = replace(pruner_of(method), block_size=block_size)
    sizes = pruner.fisher(find_layers(model))
    memory = 2 * max(fisher_bytes(layer, sizes.block_size(layer.name)) for layer in find_layers(model))
    assert ordering(model, pruner, memory).passes > 1
    prune(model, pruner, 0.5, batches=batches(4), memory=memory)
    assert 0.3 * memory < peak[0] <= memory


def test_memory__an_order_that_is_on_disk_is_in_memory_no_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    """The orders of earlier groups would else add up beside each group's Fisher."""
    held: list[weakref.ref[Tensor]] = []
    alive: list[int] = []
    save, flush = EliminationOrder.save, BlockFisher.flush

    def saved(order: EliminationOrder, *where: object, **how: object) -> None:
        save(order, *where, **how)  # type: ignore[arg-type]
        held.extend(weakref.ref(segment.columns) for one in order.values() for segment in one.updates)

    def flushed(fisher: BlockFisher) -> None:
        flush(fisher)
        alive.append(sum(tensor() is not None for tensor in held))

    monkeypatch.setattr(EliminationOrder, "save", saved)
    monkeypatch.setattr(BlockFisher, "flush", flushed)
    work = ordering(tiny_vit(), pruner_of("ovit"), 2 * LARGEST)
    work.order()
    assert len(alive) >= work.passes > 3
    assert len(held) >= len(work.layers)
    assert set(alive) == {0}
