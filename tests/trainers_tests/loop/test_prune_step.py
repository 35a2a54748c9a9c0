"""One pruning step in one process: its budget, whose layers, which gradients. On several: test_workers."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from helpers import CONVOLUTIONS, batches, quick, state, tiny_conv, tiny_swin
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from pruners import InputError, MaskSet, Sharing, create_pruner, find_layers, prune
from pruners.methods.ovit import OViT
from pruners.model.layers import PrunableLayer
from trainers.config.pruning import FisherSettings, PruningSettings
from trainers.loop.prune_step import (
    Goal,
    Gradients,
    _budget,
    gradient_source,
    ordering,
    owners,
    prunable_layers,
    prune_step,
)

OVIT = OViT(block_size=16, damp=1e-4)


def given_batches(count: int) -> Gradients:
    return Gradients(lambda: batches(count))


def test_prune_step__a_given_allocation_is_met_to_the_weight() -> None:
    model = tiny_swin()
    layers = find_layers(model)
    target = {layer.name: number * 7 for number, layer in enumerate(layers)}
    masks = MaskSet.dense(model, layers)
    source = given_batches(2)
    work = ordering(model, layers, masks, OVIT, source)
    report = prune_step(work, source, Goal(sum(target.values()), target))
    assert report.masks.pruned() == target
    assert report.damp is None
    weights = dict(model.named_parameters())
    assert {name: int((weights[name] == 0).sum()) for name in target} == target


@pytest.mark.parametrize("ceiling", [1.0, 0.8])
def test_prune_step__it_is_what_one_shot_does(ceiling: float) -> None:
    stepped, at_once = tiny_swin(), tiny_swin()
    layers = find_layers(stepped)
    source = given_batches(3)
    work = ordering(stepped, layers, MaskSet.dense(stepped, layers), OVIT, source)
    sharing = Sharing("global", ceiling=ceiling)
    report = prune_step(work, source, Goal(round(0.7 * 3840), sharing))
    expected = prune(at_once, OVIT, 0.7, batches=batches(3), ceiling=ceiling)
    assert report.masks.fingerprint() == expected.masks.fingerprint()
    assert state(stepped) == state(at_once)


@pytest.mark.parametrize("world", [1, 2, 3, 16])
def test_prune_step__layers_are_shared_out_evenly(world: int) -> None:
    sizes = (900, 500, 400, 300, 100, 100, 50)
    layers = [PrunableLayer(f"{i}.weight", "MLP", 0, (size, 1)) for i, size in enumerate(sizes)]
    owner = owners(layers, world)
    assert set(owner) == {layer.name for layer in layers}
    load = [sum(layer.numel for layer in layers if owner[layer.name] == rank) for rank in range(world)]
    assert max(load) - min(load) <= max(sizes)
    assert owner == owners(layers[::-1], world)


def test_prune_step__workers_that_disagree_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trainers.distributed.all_equal", lambda text: False)
    model = tiny_swin()
    layers = find_layers(model)
    source = given_batches(0)
    work = ordering(model, layers, MaskSet.dense(model, layers), create_pruner("dimap"), source)
    with pytest.raises(RuntimeError, match="different masks"):
        prune_step(work, source, Goal(100, Sharing("global")))


class Numbers(torch.utils.data.Dataset[tuple[Tensor, int]]):
    """Images that are their own number."""

    def __init__(self, size: int) -> None:
        self._size = size

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return torch.full((1,), float(index)), index


def taken(
    settings: FisherSettings, world: int, *, images: int = 500, tries_damps: bool = True
) -> tuple[list[int], list[int]]:
    """The numbers of the images that all workers together take gradients of, and those held out."""
    of_gradients: list[int] = []
    held_out: list[int] = []
    for rank in range(world):
        source = gradient_source(
            Numbers(images), settings, OVIT, tries_damps=tries_damps, rank=rank, world=world, seed=5
        )
        labels_taken = [number for _, labels in source.batches() for number in labels.tolist()]
        assert labels_taken == [number for _, labels in source.batches() for number in labels.tolist()]
        of_gradients += labels_taken[: source.limit] if settings.per_sample else labels_taken
        if source.held_out is not None:
            held_out += [number for _, labels in source.held_out() for number in labels.tolist()]
    return of_gradients, held_out


@given(
    gradients=st.integers(1, 40),
    batch=st.integers(1, 9),
    world=st.integers(1, 5),
    per_sample=st.booleans(),
)
@quick(80)
def test_prune_step__the_gradients_are_of_the_same_images_for_any_number_of_workers(
    gradients: int, batch: int, world: int, per_sample: bool
) -> None:
    settings = FisherSettings(gradients=gradients, batch_size=batch, per_sample=per_sample)
    labels_taken, held_out = taken(settings, world)
    alone, held_out_alone = taken(settings, 1)
    assert Counter(labels_taken) == Counter(alone)
    assert Counter(held_out) == Counter(held_out_alone)
    assert len(labels_taken) == (gradients if per_sample else gradients * batch)
    assert len(held_out) == 16 * batch
    if (gradients + 17) * batch <= 500:  # until images come round again
        assert not set(labels_taken) & set(held_out)
        assert len(set(labels_taken)) == len(labels_taken)


def test_prune_step__a_method_has_its_own_number_of_gradients_and_nothing_is_held_out_without_need() -> None:
    source = gradient_source(
        Numbers(9),
        FisherSettings(batch_size=2, memory="3MiB"),  # type: ignore[arg-type]
        create_pruner("ovit_fast"),
        tries_damps=False,
        rank=0,
        world=1,
        seed=0,
    )
    assert len(list(source.batches())) == 256
    assert source.held_out is None
    assert source.limit is None
    assert source.memory == 3 << 20


def test_prune_step__the_layers_of_a_recipe() -> None:
    model = tiny_conv()
    settings = PruningSettings(layers=CONVOLUTIONS, pattern="4:8", sparsity=0.5)  # type: ignore[arg-type]
    assert [layer.name for layer in prunable_layers(model, settings)] == ["2.weight", "4.weight"]
    with_stem = {"CONV": ("0", "2", "4")}
    with pytest.raises(InputError, match=r"4:8.*cannot fit 0\.weight, which has 3 inputs"):
        prunable_layers(model, PruningSettings(layers=with_stem, pattern="4:8", sparsity=0.5))
    dense = PruningSettings(layers=with_stem, pattern="4:8", sparsity=0.5, unfit="dense")
    assert [layer.name for layer in prunable_layers(model, dense)] == ["2.weight", "4.weight"]


@pytest.mark.parametrize(
    ("everywhere", "expected"),
    [
        ([("a", 800)], 800),
        ([("a", 800), ("a", 600)], 300),  # two on one machine
        ([("a", 800), ("b", 600), ("a", 700)], 350),
        ([("a", 800), ("b", 100)], 100),
    ],
)
def test_prune_step__all_workers_have_the_least_that_any_of_them_may_take(
    everywhere: list[tuple[str, int]], expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trainers.distributed.all_gather", lambda value: everywhere)
    assert _budget(torch.device("cpu")) == expected
    model = tiny_swin()
    layers = find_layers(model)
    masks = MaskSet.dense(model, layers)
    with pytest.raises(InputError, match=rf"memory = {expected}: bytes are not enough"):
        ordering(model, layers, masks, OVIT, given_batches(1))
    asked = Gradients(lambda: batches(1), memory=1 << 20)
    assert ordering(model, layers, masks, OVIT, asked).memory == 1 << 20
