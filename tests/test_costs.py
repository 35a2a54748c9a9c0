"""Parameters and multiply-accumulates: by hand for small models, and the paper's columns for Swin."""

from __future__ import annotations

import pytest
import timm
import torch
from helpers import tiny_vit
from torch import nn

from pruners import count_costs, find_layers
from pruners.allocation import budget, project


def test_linear_and_convolution_by_hand() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.Flatten(), nn.Linear(8 * 16, 5))
    costs = count_costs(model, (3, 4, 4), {"0.weight": 54, "2.weight": 128})
    assert costs.parameters == (3 * 8 * 9 + 8) + (128 * 5 + 5)
    assert costs.parameters_sparse == costs.parameters - 54 - 128
    convolution, linear = 16 * 3 * 8 * 9, 128 * 5
    assert costs.macs == convolution + linear
    assert costs.macs_sparse == convolution * 3 // 4 + linear * 4 // 5
    assert next(model.parameters()).device.type == "cpu"  # the model itself is left alone
    assert costs.as_dict() == {
        "parameters": costs.parameters,
        "parameters_sparse": costs.parameters_sparse,
        "macs": costs.macs,
        "macs_sparse": costs.macs_sparse,
    }


def test_vit_by_hand_with_the_attention_products() -> None:
    model = tiny_vit()
    width, depth, tokens, classes = 8, 4, 17, 5
    block = tokens * 12 * width**2 + 2 * tokens**2 * width  # qkv, proj and MLP; q·k and attention·v
    patches = 16 * 3 * 64 * width
    costs = count_costs(model, (3, 32, 32), {})
    assert costs.macs == depth * block + patches + width * classes
    assert costs.macs_sparse == costs.macs
    everything = {layer.name: layer.numel for layer in find_layers(model)}
    costs = count_costs(model, (3, 32, 32), everything)
    assert costs.macs - costs.macs_sparse == depth * tokens * 12 * width**2
    assert costs.parameters - costs.parameters_sparse == depth * 12 * width**2


@pytest.mark.parametrize("training", [True, False])
def test_the_mode_of_the_model_is_kept(training: bool) -> None:
    model = tiny_vit().train(training)
    count_costs(model, (3, 32, 32), {})
    assert model.training is training


# METHODS: dense parameters (M), dense MACs (G), MACs removed (%) at 15, 35 and 55 % of the modules
PAPER = {
    "swin_tiny_patch4_window7_224": (28.3, 4.5, (13.9, 32.4, 50.8)),
    "swin_small_patch4_window7_224": (49.6, 8.7, (14.3, 33.2, 52.3)),
    "swin_base_patch4_window7_224": (87.8, 15.4, (14.4, 33.5, 52.7)),
}


@pytest.mark.parametrize("name", PAPER)
def test_the_columns_of_the_paper(name: str) -> None:
    with torch.device("meta"):
        model = timm.create_model(name)
    parameters, macs, removed = PAPER[name]
    layers = find_layers(model)
    for ratio, expected in zip((0.15, 0.35, 0.55), removed, strict=True):
        # every layer at the same ratio; the paper's own allocation differs a little from layer to layer
        sizes = [layer.numel for layer in layers]
        counts = project([ratio] * len(sizes), sizes, budget(layers, ratio))
        pruned = {layer.name: count for layer, count in zip(layers, counts, strict=True)}
        costs = count_costs(model, (3, 224, 224), pruned)
        assert costs.parameters / 1e6 == pytest.approx(parameters, abs=0.05)
        assert costs.macs / 1e9 == pytest.approx(macs, abs=0.05)
        assert 100 * (1 - costs.macs_sparse / costs.macs) == pytest.approx(expected, abs=0.5)
        assert costs.parameters - costs.parameters_sparse == budget(layers, ratio)
