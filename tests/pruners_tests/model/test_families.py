"""Layers of timm's real architectures, against what their papers say of widths and depths."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import pytest
import timm
import torch
import torchvision
from torch import nn

from pruners import InputError, find_layers
from pruners.model.families import ANY_TRANSFORMER, FAMILIES, family_of
from pruners.model.left_dense import LeftDense


def on_meta(name: str) -> nn.Module:
    with torch.device("meta"):
        model: nn.Module = timm.create_model(name)
    return model


@dataclass(frozen=True)
class Expected:
    """Counts and weights of each module, layers of each stage, the ends, and what is left of the tensors."""

    modules: dict[str, tuple[int, int]]
    stages: Sequence[int]
    first: str
    last: str
    dense: set[str]


def transformer(blocks: Sequence[tuple[int, int]]) -> dict[str, tuple[int, int]]:
    """Modules of (depth, width) groups of blocks with MLPs four times as wide as the attention."""
    depth = sum(count for count, _ in blocks)
    squares = sum(count * width**2 for count, width in blocks)
    return {"QKV": (depth, 3 * squares), "PRJ": (depth, squares), "MLP": (2 * depth, 8 * squares)}


def swin(*dense: str) -> Expected:
    return Expected(
        transformer([(2, 96), (2, 192), (6, 384), (2, 768)]),
        (8, 8, 24, 8),
        "layers.0.blocks.0.attn.qkv",
        "layers.3.blocks.1.mlp.fc2",
        {"patch_embed.proj", "layers.N.downsample.reduction", "head.fc", *dense},
    )


def vit(width: int, *heads: str) -> Expected:
    ends = "blocks.0.attn.qkv", "blocks.11.mlp.fc2"
    return Expected(transformer([(12, width)]), (12,) * 4, *ends, {"patch_embed.proj", *heads})


def xcit(width: int) -> Expected:
    """Twelve blocks, then two whose attention (of the class token) has q, k and v apart: six layers each."""
    modules = transformer([(14, width)])
    modules["QKV"] = (12 + 2 * 3, modules["QKV"][1])
    convolutions = {"patch_embed.proj.N.N", "pos_embed.token_projection", "blocks.N.local_mp.convN"}
    ends = "blocks.0.attn.qkv", "cls_attn_blocks.1.mlp.fc2"
    return Expected(modules, (12, 12, 12, 12 + 12), *ends, convolutions | {"head"})


def efficientformer_l1() -> Expected:
    mlp = 8 * sum(depth * width**2 for depth, width in ((3, 48), (2, 96), (6, 224), (4, 448)))
    heads, key, value = 8, 32, 4 * 32  # one attention, in the last block
    modules = {
        "QKV": (1, 448 * heads * (2 * key + value)),
        "PRJ": (1, heads * value * 448),
        "MLP": (2 * 15, mlp),
    }
    dense = {"stem.convN", "stages.N.downsample.conv", "head", "head_dist"}
    # of the last stage's blocks the fourth only flattens the image into tokens
    ends = "stages.0.blocks.0.mlp.fc1", "stages.3.blocks.4.mlp.fc2"
    return Expected(modules, (6, 4, 12, 8 + 2), *ends, dense)


def efficientformerv2_s0() -> Expected:
    ratios = {32: (4, 4), 48: (4, 4), 96: (4, 3, 3, 3, 4, 4), 176: (4, 3, 3, 4)}  # S0's, found by its search
    heads, key, value = 8, 32, 4 * 32
    halving = 96 * heads * (2 * 16 + 4 * 16)  # attention at half the resolution, keys half as wide
    widths = (96, 96, 176, 176)  # two attentions at the end of each of the last two stages
    modules = {
        "QKV": (3 * 4 + 3, sum(width * heads * (2 * key + value) for width in widths) + halving),
        "PRJ": (4 + 1, sum(heads * value * width for width in widths) + heads * 4 * 16 * 176),
        "MLP": (2 * 14, sum(2 * ratio * width**2 for width, given in ratios.items() for ratio in given)),
    }
    mixer, downsample = "stages.N.blocks.N.token_mixer", "stages.N.downsample"
    dense = {
        "stem.convN.conv",
        f"{downsample}.conv.conv",
        "head",
        "head_dist",
        "stages.N.blocks.N.mlp.mid.conv",
    }
    dense |= {f"{mixer}.{part}" for part in ("stride_conv.conv", "v_local.conv", "talking_headN")}
    dense |= {f"{downsample}.attn.{part}" for part in ("q.local", "v_local.conv")}
    ends = "stages.0.blocks.0.mlp.fc1.conv", "stages.3.blocks.3.mlp.fc2.conv"
    return Expected(modules, (4, 4, 12 + 2 * 4, 8 + 2 * 4 + 4), *ends, dense)


def convnext(depths: Sequence[int], width: int) -> Expected:
    mlp = sum(8 * depth * (width * 2**stage) ** 2 for stage, depth in enumerate(depths))
    stages = [2 * depth for depth in depths]
    dense = {"stem.N", "stages.N.downsample.N", "stages.N.blocks.N.conv_dw", "head.fc"}
    ends = "stages.0.blocks.0.mlp.fc1", f"stages.3.blocks.{depths[3] - 1}.mlp.fc2"
    return Expected({"MLP": (2 * sum(depths), mlp)}, stages, *ends, dense)


def resnet50d() -> Expected:
    weights, wide = 9 * 32 * 32 + 9 * 32 * 64, 64  # the deep stem but for the convolution of the image
    depths = (3, 4, 6, 3)
    for stage, depth in enumerate(depths):
        narrow = 64 * 2**stage
        weights += wide * 4 * narrow  # the shortcut where the width changes
        for _ in range(depth):
            weights += wide * narrow + 9 * narrow**2 + narrow * 4 * narrow
            wide = 4 * narrow
    stages = [3 * depth + 1 for depth in depths]
    stages[0] += 2  # the stem has no stage of its own
    return Expected({"CONV": (sum(stages), weights)}, stages, "conv1.3", "layer4.2.conv3", {"convN.N", "fc"})


def efficientnet_b0() -> Expected:
    convolutions, gates, stages, width = 0, 0, [], 32
    # expansion, width and depth of the paper's seven stages of blocks
    for expansion, out, depth in (
        (1, 16, 1),
        (6, 24, 2),
        (6, 40, 2),
        (6, 80, 3),
        (6, 112, 3),
        (6, 192, 4),
        (6, 320, 1),
    ):
        stages.append(depth * (3 if expansion == 1 else 4))
        for _ in range(depth):
            inner = expansion * width
            convolutions += inner * out + (width * inner if expansion > 1 else 0)
            gates += 2 * inner * (width // 4)
            width = out
    stages[-1] += 1
    modules = {"CONV": (1 + 2 * 15 + 1, convolutions + 320 * 1280), "SE": (2 * 16, gates)}
    dense = {"conv_stem", "blocks.N.N.conv_dw", "classifier"}
    return Expected(modules, stages, "blocks.0.0.se.conv_reduce", "conv_head", dense)


ARCHITECTURES = {
    "vit_base_patch16_224": vit(768, "head"),
    "deit_small_patch16_224": vit(384, "head"),
    "deit_small_distilled_patch16_224": vit(384, "head", "head_dist"),
    "swin_tiny_patch4_window7_224": swin(),
    "swinv2_tiny_window8_256": swin("layers.N.blocks.N.attn.cpb_mlp.N"),
    "xcit_small_12_p16_224": xcit(384),
    "efficientformer_l1": efficientformer_l1(),
    "efficientformerv2_s0": efficientformerv2_s0(),
    "convnext_tiny": convnext((3, 3, 9, 3), 96),
    "convnextv2_atto": convnext((2, 2, 6, 2), 40),
    "resnet50d": resnet50d(),
    "efficientnet_b0": efficientnet_b0(),
}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_families__layers_of_an_architecture(name: str) -> None:
    model, expected = on_meta(name), ARCHITECTURES[name]
    layers = find_layers(model)
    counts = Counter(layer.module for layer in layers)
    weights: Counter[str] = Counter()
    for layer in layers:
        weights[layer.module] += layer.numel
    assert {module: (counts[module], weights[module]) for module in counts} == expected.modules
    assert Counter(layer.stage for layer in layers) == dict(enumerate(expected.stages))
    assert (layers[0].name, layers[-1].name) == (f"{expected.first}.weight", f"{expected.last}.weight")
    taken = {layer.name for layer in layers}
    parameters = dict(model.named_parameters())
    assert [layer.name for layer in layers] == [parameter for parameter in parameters if parameter in taken]
    assert all(layer.shape == tuple(parameters[layer.name].shape) for layer in layers)
    left = {parameter for parameter in parameters if parameter.endswith(".weight") and parameter not in taken}
    matrices = (parameter for parameter in left if parameters[parameter].ndim >= 2)
    assert {
        re.sub(r"\d+(?=[._]|$)", "N", name.removesuffix(".weight")) for name in matrices
    } == expected.dense


def test_families__the_sum_over_modules_is_the_papers() -> None:
    """What DIMAP prunes of Swin-T at 35 %: 32.0 % of 28.3 million (METHODS)."""
    weights = sum(layer.numel for layer in find_layers(on_meta("swin_tiny_patch4_window7_224")))
    assert 0.35 * weights / 28.288e6 == pytest.approx(0.320, abs=0.0005)


@pytest.mark.parametrize(
    "name",
    # plain and deep stems, two digits of blocks, gates of four kinds, kernels in a list
    [
        *("resnet18", "resnet101", "seresnet50", "ecaresnet26t", "resnest14d", "skresnet18"),
        *("res2net50_26w_4s", "resnext50d_32x4d", "efficientnetv2_rw_t", "gc_efficientnetv2_rw_t"),
        *("mixnet_s", "mnasnet_050", "mobilenetv2_050", "fbnetc_100", "efficientnet_x_b3"),
    ],
)
def test_families__every_product_in_a_block_is_taken_but_depthwise_ones(name: str) -> None:
    model = on_meta(name)
    blocks = re.compile(r"(layer\d|blocks\.\d+)\.\d+\.")
    expected = {
        f"{path}.weight"
        for path, part in model.named_modules()
        if blocks.match(path)
        and isinstance(part, nn.Conv2d | nn.Linear)
        and not (isinstance(part, nn.Conv2d) and 1 < part.groups == part.in_channels)
    }
    names = {layer.name for layer in find_layers(model) if blocks.match(layer.name)}
    assert names == expected
    assert len(names) > 10


@pytest.mark.parametrize(
    ("name", "layers"),
    [
        ("vit_base_patch16_siglip_224", 4 * 12 + 5),  # and a pooling attention: q, kv, proj and an MLP
        ("eva02_base_patch14_224", 7 * 12),  # q, k, v, proj, and a gated MLP of three
        ("aimv2_large_patch14_224", 5 * 24),
        ("cait_xxs24_224", 4 * 24 + 6 * 2),
        ("mvitv2_tiny", 4 * 10),
        ("vit_relpos_small_patch16_224", 4 * 12),  # but not the MLPs that make the position bias
    ],
)
def test_families__other_transformers_by_the_usual_names(name: str, layers: int) -> None:
    prunable = find_layers(on_meta(name))
    assert {layer.module for layer in prunable} == {"QKV", "PRJ", "MLP"}
    assert len(prunable) == layers
    assert {layer.stage for layer in prunable} == {0, 1, 2, 3}
    assert not [layer for layer in prunable if "rel_pos" in layer.name]


MBCONV = ("convN_NxN", "convN_kxk", "se.fcN", "shortcut.expand")


@pytest.mark.parametrize(
    ("name", "modules", "stages", "left"),
    [
        # LeViT-128S (2, 3, 4 blocks); two attentions at half the resolution, with an MLP each, belong to the
        # stages that they begin
        (
            "levit_128s",
            {"QKV": 9 + 2 * 2, "PRJ": 9 + 2, "MLP": 2 * (9 + 2)},
            (2 * 4, 3 * 4 + 5, 4 * 4 + 5),
            {"stem.convN.linear", "head.linear", "head_dist.linear"},
        ),
        (
            "levit_conv_128s",
            {"QKV": 13, "PRJ": 11, "MLP": 22},
            (8, 17, 21),
            {"stem.convN.linear", "head.linear", "head_dist.linear"},
        ),
        # PVT v2-B0: two blocks a stage, all but the last stage's with fewer keys and values
        (
            "pvt_v2_b0",
            {"QKV": 2 * 8, "PRJ": 8, "SR": 6, "MLP": 16},
            (12, 12, 12, 10),
            {"patch_embed.proj", "stages.N.downsample.proj", "stages.N.blocks.N.mlp.dwconv", "head"},
        ),
        # Twins-SVT-S: local and global attention in turns (2, 2, 10, 4)
        (
            "twins_svt_small",
            {"QKV": 9 + 2 * 9, "PRJ": 18, "SR": 7, "MLP": 36},
            (10, 10, 50, 18),
            {"patch_embeds.N.proj", "pos_block.N.proj.N", "head"},
        ),
        # VOLO-D1: four outlookers, 14 transformers, two of class attention
        (
            "volo_d1_224",
            {"QKV": 4 * 2 + 14 + 2 * 2, "PRJ": 20, "MLP": 40},
            (20, 16, 32, 10 + 8),
            {"patch_embed.conv.N", "patch_embed.proj", "network.N.proj", "aux_head", "head"},
        ),
        # EdgeNeXt-XXS: (2, 2, 6, 2) blocks, of which the last of each stage but the first has an attention
        (
            "edgenext_xx_small",
            {"QKV": 3, "PRJ": 3, "MLP": 24},
            (4, 6, 14, 6),
            {"stem.N", "stages.N.downsample.N", "stages.N.blocks.N.conv_dw", "stages.N.blocks.N.convs.N"}
            | {"stages.N.blocks.N.pos_embd.token_projection", "head.fc"},
        ),
        # NextViT-S: 16 convolutional blocks of 4 layers, 4 of attention and convolution
        (
            "nextvit_small",
            {"QKV": 3 * 4, "PRJ": 16 + 3 * 4, "MLP": 2 * 20, "CONV": 20},
            (12, 21, 50, 17),
            {"stem.N.conv", "stages.N.blocks.N.patch_embed.conv", "head.fc"},
        ),
        (
            "coat_lite_tiny",
            {"QKV": 8, "PRJ": 8, "MLP": 16},
            (8, 8, 8, 8),
            {"patch_embedN.proj", "cpeN.proj", "crpeN.conv_list.N", "head"},
        ),
        # CoaT-Tiny: two blocks in each of four stages, then six that run through three resolutions at once
        (
            "coat_tiny",
            {"QKV": 8 + 6 * 3, "PRJ": 8 + 6 * 3, "MLP": 16},
            (8, 8, 8, 8 + 2 * 6 * 3),
            {"patch_embedN.proj", "cpeN.proj", "crpeN.conv_list.N", "parallel_blocks.N.mlpN.fcN"}
            | {"aggregate", "head"},
        ),
        # MaxViT-T (2, 2, 5, 2 blocks): an MBConv, then attention in blocks and attention on a grid
        (
            "maxvit_tiny_tf_224",
            {"QKV": 2 * 11, "PRJ": 2 * 11, "MLP": 2 * 2 * 11},
            (16, 16, 40, 16),
            {"stem.convN", *(f"stages.N.blocks.N.conv.{part}" for part in MBCONV), "head.fc"}
            | {"head.pre_logits.fc"},
        ),
        (
            "maxvit_rmlp_pico_rw_256",  # and MLPs that make the position bias
            {"QKV": 2 * 11, "PRJ": 2 * 11, "MLP": 2 * 2 * 11},
            (16, 16, 40, 16),
            {"stem.convN", *(f"stages.N.blocks.N.conv.{part}" for part in MBCONV), "head.fc"}
            | {f"stages.N.blocks.N.attn_{part}.attn.rel_pos.mlp.fcN" for part in ("block", "grid")},
        ),
        # GC ViT-XXT (2, 2, 6, 2 blocks): local and global attention in turns
        (
            "gcvit_xxtiny",
            {"QKV": 12, "PRJ": 12, "MLP": 24},
            (8, 8, 24, 8),
            {"stem.convN", "head.fc"}
            | {
                f"{place}.{part}"
                for place in ("stem.down", "stages.N.downsample")
                for part in ("reduction", "conv_block.conv_dw", "conv_block.conv_pw", "conv_block.se.fcN")
            }
            | {f"stages.N.global_block.blocks.convN.{part}" for part in ("conv_dw", "conv_pw", "se.fcN")},
        ),
        # Hiera-T: twelve blocks in one row, as a ViT's; three of them change the width
        (
            "hiera_tiny_224",
            {"QKV": 12, "PRJ": 12, "MLP": 24},
            (12, 12, 12, 12),
            {"patch_embed.proj", "blocks.N.proj", "head.fc"},
        ),
    ],
)
def test_families__transformers_with_attention_of_their_own(
    name: str, modules: dict[str, int], stages: Sequence[int], left: set[str]
) -> None:
    model = timm.create_model(name) if "levit" in name else on_meta(name)
    layers = find_layers(model)
    assert Counter(layer.module for layer in layers) == modules
    assert Counter(layer.stage for layer in layers) == dict(enumerate(stages))
    dense = LeftDense.of(model, layers)
    kinds = {re.sub(r"\\(?=\.)", "", group.pattern.replace(r"\d+", "N")) for group in dense.groups}
    assert kinds == left


def test_families__what_stays_dense_can_be_named() -> None:
    """The patterns that are told take what they say."""
    model = on_meta("mobilevit_s")
    layers = find_layers(model)
    dense = LeftDense.of(model, layers)
    total = sum(parameter.numel() for parameter in model.parameters())
    assert dense.parameters == total - sum(layer.numel for layer in layers)
    assert dense.share == pytest.approx(0.481, abs=0.001)
    assert str(dense).startswith(
        r"48.1 % of the parameters: stages\.\d+\.\d+\.conv_fusion\.conv (3 layers, 921,600 weights), "
        r"head\.fc (1 layer, 640,000 weights), "
    )
    for group in dense.groups:
        matched = find_layers(model, {"X": [group.pattern]})
        assert (len(matched), sum(layer.numel for layer in matched)) == (group.layers, group.weights)


def test_families__torchvisions_transformer_has_the_same_weights_by_other_names() -> None:
    with torch.device("meta"):
        model = torchvision.models.vit_b_16()
    assert family_of(model) is ANY_TRANSFORMER  # though the class is called VisionTransformer there too
    layers = find_layers(model)
    own = find_layers(on_meta("vit_base_patch16_224"))
    assert [(x.module, x.stage, x.shape) for x in layers] == [(x.module, x.stage, x.shape) for x in own]
    assert layers[0].name == "encoder.layers.encoder_layer_0.self_attention.in_proj_weight"


@pytest.mark.parametrize(
    ("name", "unknown"),
    [
        ("vit_base_patch16_xp_224", "blocks.0.in_proj.weight"),  # one tensor for the attention and the MLP
        ("visformer_tiny", "stage1.0.mlp.conv1.weight"),
        ("caformer_s18", "stages.0.blocks.0.token_mixer.pwconv1.weight"),
    ],
)
def test_families__half_known_attention_is_refused(name: str, unknown: str) -> None:
    with pytest.raises(InputError, match="give patterns") as raised:
        find_layers(on_meta(name))
    assert raised.value.value == unknown


@pytest.mark.parametrize("name", ["regnety_002", "mixer_b16_224", "poolformer_s12", "focalnet_tiny_srf"])
def test_families__a_model_of_no_known_attention_asks_for_patterns(name: str) -> None:
    with pytest.raises(InputError, match="give patterns of its own"):
        find_layers(on_meta(name))


def test_families__what_stays_dense_says_why() -> None:
    for family in (*FAMILIES, ANY_TRANSFORMER):
        assert all(len(reason) > 10 for reason in family.dense.values())
        for expression in (family.inside, *family.dense, *sum(family.patterns.values(), ())):
            re.compile(expression)
