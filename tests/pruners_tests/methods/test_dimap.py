"""DIMAP: its score against the formula written out, its thresholds, and the paper's parameter column."""

from __future__ import annotations

import pytest
import timm
import torch
from helpers import lone_layer, quick, tiny_swin
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from pruners import find_layers, prune
from pruners.allocation.projection import budget, project
from pruners.allocation.sharing import GROUP_OF, group_layers
from pruners.methods.dimap import Dimap, importance


def written_out(weights: list[float]) -> list[float]:
    """Imp(W_pj) = W_pj² / Σ_{i ≤ j} W_pi², the weights sorted largest first; in the order of ``weights``."""
    largest_first = sorted(range(len(weights)), key=lambda i: -abs(weights[i]))
    scores = [0.0] * len(weights)
    for j, position in enumerate(largest_first):
        energy = sum(weights[i] ** 2 for i in largest_first[: j + 1])
        scores[position] = weights[position] ** 2 / energy if energy else 0.0
    return scores


# float32 numbers, as weights are; none so small that its square is lost in float64
floats = st.floats(-100, 100, width=32).map(lambda x: 0.0 if abs(x) < 1e-6 else x)


@given(weights=st.lists(floats, min_size=1, max_size=30))
@quick(150)
def test_dimap__the_score_is_the_formula(weights: list[float]) -> None:
    magnitudes = torch.tensor(weights).abs().sort().values
    scores = importance(magnitudes).tolist()
    assert scores == pytest.approx(sorted(written_out(weights)), rel=1e-12)


def test_dimap__the_largest_scores_1_and_zeros_score_0() -> None:
    assert importance(torch.tensor([0.0, 0.0, 3.0, 4.0])).tolist() == pytest.approx([0, 0, 9 / 25, 1])
    assert importance(torch.zeros(3)).tolist() == [0, 0, 0]
    assert importance(torch.zeros(0)).tolist() == []


@given(weights=st.lists(floats, min_size=1, max_size=30), factor=st.sampled_from([1e-3, 0.5, 7.0]))
@quick(50)
def test_dimap__the_score_does_not_depend_on_the_scale_of_a_layer(
    weights: list[float], factor: float
) -> None:
    magnitudes = torch.tensor(weights, dtype=torch.float64).abs().sort().values
    assert torch.allclose(importance(magnitudes * factor), importance(magnitudes), rtol=1e-9)


def dense_masks(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: torch.ones_like(weight, dtype=torch.bool) for name, weight in weights.items()}


@given(weights=st.lists(floats, min_size=1, max_size=30))
@quick(50)
def test_dimap__a_layer_keeps_its_ranking_by_magnitude(weights: list[float]) -> None:
    layer = lone_layer(1, len(weights))
    named = {layer.name: torch.tensor([weights])}
    order = Dimap().order(named, [layer], dense_masks(named), None)[layer.name]
    magnitudes = named[layer.name].reshape(-1).abs()[order.indices.long()]
    assert (magnitudes.diff() >= 0).all()
    assert (order.losses.diff() >= 0).all()
    assert sorted(order.indices.tolist()) == list(range(len(weights)))


def test_dimap__modules_share_one_ratio_and_each_has_one_threshold() -> None:
    model = tiny_swin()
    random = torch.Generator().manual_seed(0)
    layers = find_layers(model)
    parameters = dict(model.named_parameters())
    with (
        torch.no_grad()
    ):  # heavy tails, differently in every layer, so that layers differ in what they give up
        for number, layer in enumerate(layers):
            parameters[layer.name].copy_(torch.randn(layer.shape, generator=random) ** (1 + 2 * (number % 3)))
    scores = {
        layer.name: torch.tensor(written_out(parameters[layer.name].reshape(-1).tolist())).reshape(
            layer.shape
        )
        for layer in layers
    }
    report = prune(model, "dimap", 0.4)
    modules = group_layers(layers, lambda layer: layer.module)
    assert set(modules) == {"QKV", "PRJ", "MLP"}
    for group in modules.values():
        numel = sum(layer.numel for layer in group)
        assert sum(report.allocation[layer.name] for layer in group) == pytest.approx(0.4 * numel, abs=1)
        fallen = torch.cat([scores[layer.name][~report.masks[layer.name]] for layer in group])
        stay = torch.cat([scores[layer.name][report.masks[layer.name]] for layer in group])
        assert fallen.max() <= stay.min()
    shares = [report.allocation[layer.name] / layer.numel for layer in layers]
    assert max(shares) - min(shares) > 0.1  # not a uniform allocation in disguise


@pytest.mark.parametrize("sparsity", [0.1, 0.5, 0.83])
def test_dimap__lamp_is_the_same_score_with_one_threshold_for_the_model(sparsity: float) -> None:
    model = tiny_swin()
    layers = find_layers(model)
    random = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for number, layer in enumerate(layers):  # LAMP does not look at the scale of a layer
            drawn = torch.randn(layer.shape, generator=random) ** (1 + 2 * (number % 2))
            model.get_parameter(layer.name).copy_(10.0**number * drawn)
    scores = {
        layer.name: torch.tensor(written_out(model.get_parameter(layer.name).reshape(-1).tolist()))
        for layer in layers
    }
    report = prune(model, "lamp", sparsity)
    every = torch.cat(list(scores.values()))
    threshold = every.sort().values[round(sparsity * len(every)) - 1]
    for layer in layers:
        fallen = ~report.masks[layer.name].reshape(-1)
        assert torch.equal(fallen, scores[layer.name] <= threshold)
        weight = model.get_parameter(layer.name).reshape(-1)
        assert torch.equal(weight == 0, fallen)
    per_module = prune(tiny_swin(), "dimap", sparsity, scope="global")
    assert per_module.allocation == prune(tiny_swin(), "lamp", sparsity).allocation


# parameters removed (%) at 15, 35 and 55 % of the modules
PAPER = {
    "swin_tiny_patch4_window7_224": (13.7, 32.0, 50.3),
    "swin_small_patch4_window7_224": (14.2, 33.2, 52.2),
    "swin_base_patch4_window7_224": (14.3, 33.4, 52.5),
}


@pytest.mark.parametrize("name", PAPER)
def test_dimap__the_parameter_column_of_the_paper(name: str) -> None:
    with torch.device("meta"):
        model = timm.create_model(name)
    layers = find_layers(model)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    modules = group_layers(layers, GROUP_OF[Dimap().scope])
    sizes = [sum(layer.numel for layer in group) for group in modules.values()]
    assert set(modules) == {"QKV", "PRJ", "MLP"}
    for ratio, expected in zip((0.15, 0.35, 0.55), PAPER[name], strict=True):
        # how allocate() shares the budget among the modules, before the thresholds within each
        counts = project([ratio] * len(sizes), sizes, budget(layers, ratio))
        assert 100 * sum(counts) / parameters == pytest.approx(expected, abs=0.1)
        assert counts == pytest.approx([ratio * size for size in sizes], abs=1)
