"""A pruned checkpoint as the backbone of something else: timm's ``features_only`` over our folders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from image_tables import SWIN, VIT, tiny
from torch import nn

from pruners import prune
from trainers.checkpoint.folder import save_checkpoint

RESNET = "resnet10t"
SIDE = {VIT: 16, SWIN: 16, RESNET: 64}


def sparse(folder: Path, architecture: str) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    """A checkpoint folder, its model, and what is zero in it."""
    if architecture == RESNET:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model: nn.Module = timm.create_model(RESNET, num_classes=3).eval()
    else:
        model, _ = tiny(architecture)
    masks = prune(model, "magnitude", 0.6).masks
    save_checkpoint(folder, model, model_args={}, masks=masks, record={})
    return model, {name: ~mask for name, mask in masks.items()}


@pytest.mark.parametrize(
    ("architecture", "options"),
    [
        (VIT, {"out_indices": (0, 1)}),
        (VIT, {"out_indices": (-1,), "dynamic_img_size": True}),
        (SWIN, {}),
        (SWIN, {"dynamic_img_size": True}),
        (RESNET, {}),
        (RESNET, {"out_indices": (2, 4)}),
    ],
)
def test_backbone__features_are_those_of_the_pruned_model(
    architecture: str, options: dict[str, Any], tmp_path: Path
) -> None:
    model, pruned = sparse(tmp_path / "m", architecture)
    backbone = timm.create_model(f"local-dir:{tmp_path}/m", pretrained=True, features_only=True, **options)
    sides = (SIDE[architecture], SIDE[architecture])
    if "dynamic_img_size" in options:
        sides = (24, 32)
        model = timm.create_model(f"local-dir:{tmp_path}/m", pretrained=True, dynamic_img_size=True).eval()
    given = torch.randn(2, 3, *sides, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        features = backbone.eval()(given)
        expected = model.forward_intermediates(  # type: ignore[operator]
            given, indices=list(backbone.feature_info.out_indices), intermediates_only=True
        )
    assert len(features) == len(expected) == len(backbone.feature_info.channels())
    for feature, other, channels in zip(features, expected, backbone.feature_info.channels(), strict=True):
        same = feature if architecture != SWIN else feature.permute(0, 3, 1, 2)  # timm gives Swin's as NHWC
        assert same.shape[1] == channels
        assert torch.equal(same, other)
    weights = dict(backbone.named_parameters())
    for name, zeros in pruned.items():
        assert torch.equal(weights[in_backbone(name, architecture)] == 0, zeros)


def in_backbone(name: str, architecture: str) -> str:
    """A layer's name there: ViT is wrapped, Swin's stages are taken out of their list."""
    if architecture == VIT:
        return f"model.{name}"
    return name.replace("layers.", "layers_", 1) if architecture == SWIN else name
