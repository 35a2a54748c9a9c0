"""Gradients for the Fisher: eval mode, one batch's mean loss each, masked."""

from __future__ import annotations

import torch
from helpers import batches, tiny_vit
from torch import nn

from pruners import MaskSet, find_layers
from pruners.gradients import batch_gradients


def test_each_is_the_masked_gradient_of_one_batch_in_eval_mode() -> None:
    model = tiny_vit()
    model.pos_drop.p = 0.9  # in training mode the gradients would be others
    layers = find_layers(model)
    random = torch.Generator().manual_seed(0)
    masks = MaskSet({layer.name: torch.rand(layer.shape, generator=random) < 0.5 for layer in layers})
    loss = nn.functional.cross_entropy
    found = list(batch_gradients(model.train(), layers, masks, batches(4), loss, limit=3))
    assert len(found) == 3
    model.eval()
    for gradients, (images, labels) in zip(found, batches(3), strict=True):
        model.zero_grad()
        loss(model(images), labels).backward()
        assert set(gradients) == set(masks)
        for name, gradient in gradients.items():
            expected = model.get_parameter(name).grad
            assert expected is not None
            torch.testing.assert_close(gradient, torch.where(masks[name], expected, 0.0))
            assert gradient.any()
