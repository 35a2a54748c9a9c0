"""Magnitude: uniform by layer, or one threshold on |w| for the model."""

from __future__ import annotations

import torch
from helpers import tiny_swin

from pruners import find_layers, prune


def test_uniform_takes_the_smallest_of_every_layer() -> None:
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


def test_global_takes_the_smallest_of_the_model() -> None:
    model = tiny_swin()
    layers = find_layers(model)
    with torch.no_grad():
        model.get_parameter(layers[0].name).mul_(100)  # one layer of large weights stays whole
    before = {layer.name: model.get_parameter(layer.name).detach().clone() for layer in layers}
    report = prune(model, "magnitude", 0.6, scope="global")
    fallen = torch.cat([before[layer.name][~report.masks[layer.name]].abs() for layer in layers])
    kept = torch.cat([before[layer.name][report.masks[layer.name]].abs() for layer in layers])
    assert len(fallen) == round(0.6 * sum(layer.numel for layer in layers))
    assert fallen.max() <= kept.min()
    assert report.allocation[layers[0].name] < 0.05 * layers[0].numel
