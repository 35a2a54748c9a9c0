"""What every pruning method keeps, whichever it is and whatever shares one threshold.

A method added to :data:`pruners.METHODS` is held to it without a line here.
"""

from __future__ import annotations

import copy
from typing import get_args

import pytest
import torch
from helpers import MODELS, PRUNERS, batches, quick, state, threads, tiny_swin, tiny_vit, uneven, zeros
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from pruners import PrunableLayer, Pruner, PruneReport, Scope, create_pruner, find_layers, prune

SCOPES = get_args(Scope)

every_method = pytest.mark.parametrize("method", PRUNERS)
with_gradients = pytest.mark.parametrize(
    "method", [name for name, make in PRUNERS.items() if make().gradients]
)


def pruned(
    model: nn.Module, method: str, sparsity: float, scope: Scope | None = None
) -> tuple[PruneReport, list[PrunableLayer]]:
    report = prune(model, PRUNERS[method](), sparsity, batches=batches(), scope=scope)
    return report, find_layers(model)


def assert_exact(model: nn.Module, report: PruneReport, layers: list[PrunableLayer], sparsity: float) -> None:
    """Exactly the asked number of zeros, where the report says; finite weights; all else untouched."""
    numel = sum(layer.numel for layer in layers)
    total = round(sparsity * numel)
    zero_masks = zeros(model, layers)
    assert sum(int(zero.sum()) for zero in zero_masks.values()) == total
    assert sum(report.allocation.values()) == total
    assert report.sparsity == pytest.approx(total / numel, abs=1e-12)
    assert report.masks.pruned() == report.allocation
    for layer in layers:
        assert torch.equal(zero_masks[layer.name], ~report.masks[layer.name])
        assert torch.isfinite(model.get_parameter(layer.name)).all()


@every_method
@pytest.mark.parametrize(
    ("kind", "sparsity", "scope"),
    [("swin", 0.5, "module"), ("swin", 1.0, "global"), ("vit", 0.0, "stage"), ("vit", 0.937, "layer")],
)
def test_pruner_contract__finite_weights_and_an_exact_count(
    method: str, scope: Scope, kind: str, sparsity: float
) -> None:
    model = MODELS[kind]()
    before = copy.deepcopy(model.state_dict())
    report, layers = pruned(model, method, sparsity, scope)
    assert_exact(model, report, layers, sparsity)
    assert report.method == PRUNERS[method]().name
    for name, tensor in model.state_dict().items():
        if name not in report.masks or sparsity == 0:
            assert torch.equal(tensor, before[name])


@every_method
@given(sparsity=st.floats(0, 1), scope=st.sampled_from(SCOPES), seed=st.integers(0, 50))
@quick(8)
def test_pruner_contract__the_count_is_exact_at_any_sparsity(
    method: str, sparsity: float, scope: Scope, seed: int
) -> None:
    model = tiny_vit(seed)
    report, layers = pruned(model, method, sparsity, scope)
    assert_exact(model, report, layers, sparsity)


@every_method
@pytest.mark.parametrize("scope", ["global", "layer"])
def test_pruner_contract__old_zeros_stay_zero(method: str, scope: Scope) -> None:
    model = tiny_swin()
    earlier = None
    random = torch.Generator().manual_seed(0)
    for sparsity in (0.3, 0.55, 0.8):
        report, layers = pruned(model, method, sparsity, scope)
        assert_exact(model, report, layers, sparsity)
        if earlier is not None:
            for name, mask in earlier.items():
                assert not (report.masks[name] & ~mask).any()
        earlier = report.masks
        with torch.no_grad():  # recovery: what stays moves
            for name, mask in earlier.items():
                weight = model.get_parameter(name)
                weight += 0.02 * torch.randn(weight.shape, generator=random) * mask


@every_method
def test_pruner_contract__what_the_masks_say_is_pruned_falls_first_at_no_loss(method: str) -> None:
    """Even where its weight has drifted from zero, and other weights are zero without being pruned."""
    model = tiny_vit()
    layers = find_layers(model)
    random = torch.Generator().manual_seed(0)
    weights = {layer.name: torch.randn(layer.shape, generator=random) for layer in layers}
    masks = {name: torch.rand(weight.shape, generator=random) < 0.7 for name, weight in weights.items()}
    for name, weight in weights.items():
        weight[torch.rand(weight.shape, generator=random) < 0.1] = 0.0
        weight[~masks[name]] += 9.0
    pruner = PRUNERS[method]()
    fisher = pruner.fisher(layers)
    if fisher is not None:
        for _ in range(4):
            fisher.add({layer.name: 1e-3 * torch.randn(layer.shape, generator=random) for layer in layers})
    order = pruner.order(weights, layers, masks, fisher)
    for name, mask in masks.items():
        count = int((~mask).sum())
        assert torch.equal(order[name].mask(mask.shape, count), mask)
        assert (order[name].losses[:count] == 0).all()
        assert (order[name].losses.diff() >= 0).all()
        assert sorted(order[name].indices.tolist()) == list(range(mask.numel()))


@every_method
def test_pruner_contract__a_share_of_the_layers_is_ordered_as_in_the_whole(method: str) -> None:
    model = tiny_vit()
    layers = find_layers(model)
    weights = {layer.name: model.get_parameter(layer.name).detach() for layer in layers}
    masks = {name: weight != 0 for name, weight in weights.items()}
    random = torch.Generator().manual_seed(0)
    gradients = [
        {layer.name: 1e-3 * torch.randn(layer.shape, generator=random) for layer in layers} for _ in range(4)
    ]

    def order(chosen: list[PrunableLayer]) -> dict[str, tuple[Tensor, Tensor]]:
        pruner = PRUNERS[method]()
        fisher = pruner.fisher(chosen)
        for gradient in gradients if fisher is not None else ():
            fisher.add(gradient)
        orders = pruner.order(weights, chosen, masks, fisher)
        return {name: (one.indices, one.losses) for name, one in orders.items()}

    whole, shares = order(layers), order(layers[::2]) | order(layers[1::2])
    assert set(whole) == set(shares) == set(weights)
    for name, (indices, losses) in whole.items():
        assert torch.equal(indices, shares[name][0])
        assert torch.equal(losses, shares[name][1])


@every_method
def test_pruner_contract__same_seed_same_result_on_one_thread_or_two(method: str) -> None:
    results = []
    for count in (1, 1, 2):
        model = tiny_swin(seed=3)
        with threads(count):
            report, _ = pruned(model, method, 0.7)
        results.append((state(model), report.masks.fingerprint(), report.allocation))
    assert results[0] == results[1] == results[2]


@every_method
def test_pruner_contract__another_seed_another_result(method: str) -> None:
    reports = [pruned(tiny_vit(seed), method, 0.5)[0] for seed in (0, 1)]
    assert reports[0].masks.fingerprint() != reports[1].masks.fingerprint()


@every_method
@pytest.mark.parametrize("training", [True, False])
def test_pruner_contract__modes_and_gradients_are_left_as_they_were(method: str, training: bool) -> None:
    model = uneven(training)
    before = {key: value for key, value in state(model).items() if key.endswith((".grad", ".training"))}
    pruned(model, method, 0.5)
    after = state(model)
    assert {key: after[key] for key in before} == before


@with_gradients
def test_pruner_contract__no_more_batches_are_drawn_than_asked_for(method: str) -> None:
    source = iter(batches(6))
    first = tiny_vit()
    prune(first, PRUNERS[method](), 0.5, batches=source, gradients=4)
    assert len(list(source)) == 2
    second = tiny_vit()
    prune(second, PRUNERS[method](), 0.5, batches=batches(6)[:4])
    assert state(first) == state(second)


@with_gradients
def test_pruner_contract__gradients_are_those_of_the_given_loss(method: str) -> None:
    usual, other = tiny_vit(), tiny_vit()
    pruned(usual, method, 0.5)
    prune(
        other,
        PRUNERS[method](),
        0.5,
        batches=batches(),
        loss=lambda outputs, labels: outputs[:, 0].square().mean(),
    )
    assert state(usual) != state(other)


@every_method
def test_pruner_contract__every_method_is_a_pruner_with_a_scope_of_its_own(method: str) -> None:
    pruner: Pruner = PRUNERS[method]()
    assert pruner.scope in SCOPES
    by_default, _ = pruned(tiny_vit(), method, 0.6)
    by_name, _ = pruned(tiny_vit(), method, 0.6, pruner.scope)
    assert by_default.allocation == by_name.allocation
    if method == pruner.name:
        assert create_pruner(method) == pruner


@every_method
def test_pruner_contract__chosen_layers_only(method: str) -> None:
    model = tiny_vit()
    layers = find_layers(model, {"QKV": [r"attn\.qkv"]})
    before = copy.deepcopy(model.state_dict())
    report = prune(model, PRUNERS[method](), 0.5, batches=batches(), layers=layers)
    assert_exact(model, report, layers, 0.5)
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == {layer.name for layer in layers}
