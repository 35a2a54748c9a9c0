"""Magnitude: uniform by layer, or one threshold on |w| for the model."""

from __future__ import annotations

import pytest
import torch
from helpers import CONVOLUTIONS, tiny_conv, tiny_swin

from pruners import Scope, find_layers, prune


def test_magnitude__uniform_takes_the_smallest_of_every_layer() -> None:
    model = tiny_swin()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    report = prune(model, "magnitude", 0.6)
    for layer in find_layers(model):
        count = report.allocation[layer.name]
        assert abs(count - 0.6 * layer.numel) < 1
        weight = before[layer.name].reshape(-1)
        smallest = weight.abs().sort().indices[:count]
        expected = weight.clone()
        expected[smallest] = 0.0
        assert torch.equal(model.get_parameter(layer.name).detach().reshape(-1), expected)


@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.6, 1.0])
@pytest.mark.parametrize(("method", "scope"), [("magnitude_global", None), ("magnitude", "global")])
def test_magnitude__global_is_a_sort_of_all_weights(
    method: str, scope: Scope | None, sparsity: float
) -> None:
    model = tiny_swin()
    layers = find_layers(model)
    with torch.no_grad():
        model.get_parameter(layers[0].name).mul_(100)  # one layer of large weights stays nearly whole
    before = torch.cat([model.get_parameter(layer.name).detach().reshape(-1) for layer in layers])
    report = prune(model, method, sparsity, scope=scope)
    count = round(sparsity * len(before))
    expected = before.clone()
    expected[before.abs().sort().indices[:count]] = 0.0
    after = torch.cat([model.get_parameter(layer.name).detach().reshape(-1) for layer in layers])
    assert torch.equal(after, expected)
    if sparsity == 0.6:
        assert report.allocation[layers[0].name] < 0.05 * layers[0].numel


def test_magnitude__blocks_of_four_fall_by_their_norm() -> None:
    model = tiny_conv()
    layers = find_layers(model, CONVOLUTIONS)
    weight = model.get_parameter("2.weight").detach().clone()
    prune(model, "magnitude", 0.5, layers=layers, pattern="1x4")
    norms = weight.reshape(16, 2, 4, 3, 3).norm(dim=2)  # of four inputs of an output at a kernel position
    kept = (model.get_parameter("2.weight") != 0).reshape(16, 2, 4, 3, 3)
    assert torch.equal(kept.all(2), kept.any(2))
    assert norms[~kept.any(2)].max() <= norms[kept.any(2)].min()
    assert int((~kept).sum()) == weight.numel() // 2


def test_magnitude__of_each_four_the_two_smallest_fall() -> None:
    model = tiny_conv()
    layers = find_layers(model, CONVOLUTIONS)
    weight = model.get_parameter("2.weight").detach().clone()
    prune(model, "magnitude", layers=layers, pattern="2:4")
    groups = weight.abs().reshape(16, 2, 4, 3, 3)
    expected = groups >= groups.sort(2).values[:, :, 2:3]
    assert torch.equal((model.get_parameter("2.weight") != 0).reshape(16, 2, 4, 3, 3), expected)
