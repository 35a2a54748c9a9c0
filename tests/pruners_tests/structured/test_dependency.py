"""Which parameters share their channels: by torch-pruning, where it counts right and where it does not."""

from __future__ import annotations

import importlib.util

import pytest
import timm
import torch
from helpers import state, tiny_swin, uneven
from image_tables import SWIN, VIT, VIT_ARGS, tiny
from torch import Tensor, nn

from pruners.errors import InputError
from pruners.structured.channels import Channels
from pruners.structured.dependency import ChannelDependencies

IMAGES = torch.zeros(2, 3, 16, 16)


def members(channels: Channels) -> dict[str, tuple[int, int]]:
    """Parameter -> (dimension, places of a channel)."""
    return {one.name: (one.dim, one.positions.shape[1]) for one in channels.members}


@pytest.mark.parametrize(("architecture", "block"), [(VIT, "blocks.1"), (SWIN, "layers.1.blocks.0")])
def test_dependency__an_mlp_and_an_attention(architecture: str, block: str) -> None:
    graph = ChannelDependencies(tiny(architecture)[0], IMAGES)
    assert members(graph.of(f"{block}.mlp.fc1")) == {
        f"{block}.mlp.fc1.weight": (0, 1),
        f"{block}.mlp.fc1.bias": (0, 1),
        f"{block}.mlp.fc2.weight": (1, 1),
    }
    inner = graph.of(f"{block}.attn.qkv")
    assert members(inner) == {
        f"{block}.attn.qkv.weight": (0, 3),
        f"{block}.attn.qkv.bias": (0, 3),
        f"{block}.attn.proj.weight": (1, 1),
    }
    (positions,) = {tuple(map(tuple, one.positions.tolist())) for one in inner.members if "qkv" in one.name}
    # query, key and value of a channel lie a third of the matrix apart
    assert positions == tuple((channel, 16 + channel, 32 + channel) for channel in range(16))


def test_dependency__the_embedding_of_a_vit_is_everywhere() -> None:
    model = tiny(VIT)[0]
    coupled = members(ChannelDependencies(model, IMAGES).of("patch_embed.proj"))
    elsewhere = {name for name in dict(model.named_parameters()) if name not in coupled}
    inside = {f"blocks.{i}.{part}" for i in range(2) for part in ("attn.qkv.bias", "mlp.fc1.bias")}
    assert elsewhere == inside | {"head.bias"}
    assert coupled["cls_token"] == coupled["pos_embed"] == (2, 1)


def test_dependency__layer_scales_and_other_tokens_are_coupled_too() -> None:
    arguments = {**VIT_ARGS, "init_values": 0.1}
    scaled = timm.create_model(VIT, num_classes=3, **arguments)
    coupled = members(ChannelDependencies(scaled, IMAGES).of("patch_embed.proj"))
    assert coupled["blocks.0.ls1.gamma"] == (0, 1)
    distilled = timm.create_model("deit_tiny_distilled_patch16_224", num_classes=3, **VIT_ARGS)
    coupled = members(ChannelDependencies(distilled, IMAGES).of("patch_embed.proj"))
    assert coupled["dist_token"] == (2, 1)
    assert coupled["head_dist.weight"] == (1, 1)


def test_dependency__merged_patches_lie_beside_each_other() -> None:
    """torch-pruning finds one place of a channel in a norm over four patches."""
    model = tiny(SWIN)[0]
    channels = ChannelDependencies(model, IMAGES).of("patch_embed.proj")
    (norm,) = [one for one in channels.members if one.name == "layers.1.downsample.norm.weight"]
    assert norm.positions.tolist() == [[c, 8 + c, 16 + c, 24 + c] for c in range(8)]
    # as the model itself has it: a channel of 1 in the first stage is seen at these places
    seen: list[Tensor] = []
    merge = model.get_submodule("layers.1.downsample")
    merge.get_submodule("norm").register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    inputs = torch.zeros(1, 2, 2, 8)
    inputs[..., 5] = 1.0
    merge(inputs)
    assert seen[0].flatten().nonzero().flatten().tolist() == norm.positions[5].tolist()


def test_dependency__relative_positions_have_no_channels() -> None:
    model = tiny(SWIN)[0]
    graph = ChannelDependencies(model, IMAGES)
    roots = ["patch_embed.proj", "layers.1.downsample.reduction", "layers.0.blocks.0.attn.qkv"]
    assert not any("relative" in name for root in roots for name in members(graph.of(root)))


class _Merging(nn.Module):
    """Patches merged as Swin merges them, under another name."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(3, 4)
        self.merge = nn.Linear(8, 2)

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.stem(images.flatten(2).transpose(1, 2))
        pairs = tokens.reshape(len(tokens), -1, 2, 4).permute(0, 1, 2, 3).flatten(2)
        merged: Tensor = self.merge(pairs)
        return merged


def test_dependency__what_is_miscounted_is_an_error() -> None:
    graph = ChannelDependencies(_Merging(), IMAGES)
    with pytest.raises(InputError, match=r"merge\.weight.*torch-pruning finds no channel of its own"):
        graph.of("stem")


def test_dependency__the_model_is_left_as_it_was() -> None:
    model = uneven()
    before = state(model)
    ChannelDependencies(model, torch.zeros(2, 3, 32, 32)).of("patch_embed.proj")
    assert state(model) == before


def test_dependency__it_works_where_nothing_is_differentiated() -> None:
    model = tiny_swin().requires_grad_(False)
    with torch.no_grad():
        channels = ChannelDependencies(model, torch.zeros(2, 3, 32, 32)).of("layers.0.blocks.0.mlp.fc1")
    assert channels.count == 32
    assert not any(weight.requires_grad for weight in model.parameters())


def test_dependency__without_torch_pruning_one_line_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"pip install 'espalier\[deploy\]'"):
        ChannelDependencies(tiny(VIT)[0], IMAGES)
