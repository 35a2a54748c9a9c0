"""One order, many allocations: each the same as pruning anew; and what is stored reads back."""

from __future__ import annotations

import copy
from functools import lru_cache
from typing import get_args

import pytest
import torch
from helpers import PRUNERS, batches, quick, tiny_vit
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load, save
from torch import Tensor, nn

from pruners import (
    EliminationOrder,
    MaskSet,
    PrunableLayer,
    Scope,
    allocate,
    find_layers,
    prune,
)
from pruners.allocation import budget
from pruners.fisher import BlockFisher
from pruners.gradients import batch_gradients
from pruners.order import LayerOrder


@lru_cache
def prepared(
    method: str,
) -> tuple[nn.Module, list[PrunableLayer], dict[str, Tensor], BlockFisher | None, EliminationOrder]:
    """A model (a fifth of it pruned already), and one order of its weights."""
    model = tiny_vit()
    layers = find_layers(model)
    prune(model, "magnitude", 0.2, scope="global")
    pruner = PRUNERS[method]()
    masks = MaskSet.from_zeros(model, layers)
    fisher = pruner.fisher(layers)
    if fisher is not None:
        for gradient in batch_gradients(
            model, layers, masks, batches(), nn.functional.cross_entropy, limit=6
        ):
            fisher.add(gradient)
    weights = {layer.name: model.get_parameter(layer.name).detach() for layer in layers}
    return model, layers, weights, fisher, pruner.order(weights, layers, masks, fisher)


@pytest.mark.parametrize("method", PRUNERS)
@pytest.mark.parametrize("scope", get_args(Scope))
def test_weights_at_any_allocation_are_those_of_pruning_anew(method: str, scope: Scope) -> None:
    model, layers, weights, _, order = prepared(method)
    for sparsity in (0.25, 0.6, 0.95):
        anew = copy.deepcopy(model)
        report = prune(anew, PRUNERS[method](), sparsity, batches=batches(), scope=scope)
        allocation = allocate(order.losses, layers, budget(layers, sparsity), scope)
        new, masks = order.weights_at(weights, allocation)
        assert allocation == report.allocation
        assert masks.fingerprint() == report.masks.fingerprint()
        for name, weight in new.items():
            assert torch.equal(weight, anew.get_parameter(name).detach())


@pytest.mark.parametrize("method", PRUNERS)
@given(data=st.data())
@quick(40)
def test_any_allocation_gives_exact_nested_masks_and_leaves_the_old_weights(
    method: str, data: st.DataObject
) -> None:
    _, layers, weights, _, order = prepared(method)
    counts = {layer.name: data.draw(st.integers(0, layer.numel)) for layer in layers}
    before = {name: weight.clone() for name, weight in weights.items()}
    new, masks = order.weights_at(weights, counts)
    more, _ = order.weights_at(weights, {layer.name: layer.numel for layer in layers})
    deeper = {layer.name: data.draw(st.integers(counts[layer.name], layer.numel)) for layer in layers}
    _, smaller = order.weights_at(weights, deeper)
    assert masks.pruned() == counts
    for name, weight in new.items():
        assert torch.isfinite(weight).all()
        assert (weight[~masks[name]] == 0).all()
        assert not (smaller[name] & ~masks[name]).any()  # what has fallen stays fallen
        assert not more[name].any()
        assert torch.equal(weights[name], before[name])
        assert weight.data_ptr() != weights[name].data_ptr()


@pytest.mark.parametrize("method", [name for name in PRUNERS if name.startswith("ovit")])
@given(data=st.data())
@quick(25)
def test_survivors_are_the_closed_form_at_any_allocation(method: str, data: st.DataObject) -> None:
    """w_K + F_KK⁻¹·F_KS·w_S of each block (METHODS item 3), S without what was zero before."""
    _, layers, weights, fisher, order = prepared(method)
    assert fisher is not None
    layer = data.draw(st.sampled_from(layers))
    size = fisher.block_size(layer.name)
    count = data.draw(st.integers(order[layer.name].zeros, layer.numel))
    old = weights[layer.name].reshape(-1).double()
    found = order[layer.name].weight(weights[layer.name], count).reshape(-1).double()
    keep = order[layer.name].mask((layer.numel,), count)
    for number, sums in enumerate(fisher.sums[layer.name]):
        block = slice(number * size, min((number + 1) * size, layer.numel))
        w, kept = old[block], keep[block]
        f = (sums.double() / fisher.count + fisher.damp * torch.eye(size))[: len(w), : len(w)]
        fallen = ~kept & (w != 0)
        expected = torch.zeros_like(w)
        expected[kept] = w[kept] + torch.linalg.solve(f[kept][:, kept], f[kept][:, fallen] @ w[fallen])
        torch.testing.assert_close(found[block], expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("method", PRUNERS)
def test_stored_arrays_read_back(method: str) -> None:
    _, layers, weights, _, order = prepared(method)
    arrays = order.arrays()
    assert all(tensor.is_contiguous() for tensor in arrays.values())
    stored = EliminationOrder.from_arrays(load(save(arrays)))
    assert set(stored) == set(order)
    for name, layer_order in order.items():
        assert torch.equal(stored[name].indices, layer_order.indices)
        assert torch.equal(stored[name].losses, layer_order.losses)
        assert stored[name].zeros == layer_order.zeros
        assert (stored[name].updates is None) == (layer_order.updates is None)
    allocation = allocate(order.losses, layers, budget(layers, 0.7), "global")
    assert allocate(stored.losses, layers, budget(layers, 0.7), "global") == allocation
    new, masks = order.weights_at(weights, allocation)
    again, masks_again = stored.weights_at(weights, allocation)
    assert masks.fingerprint() == masks_again.fingerprint()
    assert all(torch.equal(new[name], again[name]) for name in new)


def test_a_layer_without_updates_keeps_what_stays() -> None:
    order = LayerOrder(torch.tensor([2, 0, 1, 3]), torch.tensor([0.0, 1.0, 2.0, 3.0]))
    weight = torch.tensor([[1.0, 2.0], [0.5, 4.0]])
    assert order.weight(weight, 2).tolist() == [[0.0, 2.0], [0.0, 4.0]]
    assert order.mask((2, 2), 1).tolist() == [[True, True], [False, True]]
    assert order.weight(weight.half(), 2).dtype == torch.float16
