"""Which weights are found in timm's models, and each one's module and stage."""

from __future__ import annotations

from collections import Counter

import pytest
import timm
import torch
from helpers import tiny_swin, tiny_vit
from torch import nn

from pruners import InputError, find_layers


def on_meta(name: str) -> nn.Module:
    with torch.device("meta"):
        model: nn.Module = timm.create_model(name)
    return model


def test_swin_modules_stages_and_order() -> None:
    layers = find_layers(on_meta("swin_tiny_patch4_window7_224"))
    assert Counter(layer.module for layer in layers) == {"QKV": 12, "PRJ": 12, "MLP": 24}
    assert Counter(layer.stage for layer in layers) == {0: 8, 1: 8, 2: 24, 3: 8}
    assert [layer.name for layer in layers[:4]] == [
        f"layers.0.blocks.0.{tail}.weight" for tail in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    ]
    assert layers[0].shape == (288, 96)
    assert layers[0].numel == 288 * 96
    assert not [layer.name for layer in layers if "downsample" in layer.name or "head" in layer.name]


def test_an_isotropic_model_is_cut_into_four_equal_groups_of_blocks() -> None:
    layers = find_layers(on_meta("deit_tiny_patch16_224"))
    blocks = {int(layer.name.split(".")[1]): layer.stage for layer in layers}
    assert blocks == {block: block // 3 for block in range(12)}
    assert Counter(layer.module for layer in layers) == {"QKV": 12, "PRJ": 12, "MLP": 24}


@pytest.mark.parametrize(
    ("name", "stages"),
    [
        ("vit_tiny_patch16_224", 4),
        ("swinv2_tiny_window8_256", 4),
        ("swin_small_patch4_window7_224", 4),
        ("xcit_nano_12_p16_224", 4),
    ],
)
def test_families_of_the_papers_are_found_without_patterns(name: str, stages: int) -> None:
    model = on_meta(name)
    layers = find_layers(model)
    assert {layer.module for layer in layers} == {"QKV", "PRJ", "MLP"}
    assert {layer.stage for layer in layers} == set(range(stages))
    parameters = dict(model.named_parameters())
    assert all(tuple(parameters[layer.name].shape) == layer.shape for layer in layers)
    assert [layer.name for layer in layers] == [
        name for name in parameters if name in {x.name for x in layers}
    ]


def test_patterns_of_oViT_for_resnet() -> None:
    layers = find_layers(
        on_meta("resnet50d"), {"CONV": [r"conv1\.(3|6)", r"layer\d\.\d\.(conv\d|downsample.1)"]}
    )
    assert len(layers) == 2 + 16 * 3 + 4
    assert {layer.name for layer in layers} >= {"conv1.3.weight", "layer1.0.downsample.1.weight"}
    # the stem has no stage of its own: it joins the first
    assert Counter(layer.stage for layer in layers) == {0: 2 + 9 + 1, 1: 12 + 1, 2: 18 + 1, 3: 9 + 1}


def test_layers_outside_the_blocks_join_their_neighbour() -> None:
    layers = find_layers(on_meta("xcit_nano_12_p16_224"))
    stage_of = {layer.name: layer.stage for layer in layers}
    assert stage_of["blocks.0.mlp.fc1.weight"] == 0
    assert {stage for name, stage in stage_of.items() if name.startswith("cls_attn_blocks")} == {3}


def test_a_pattern_matches_whole_names_only() -> None:
    model = tiny_vit()
    assert len(find_layers(model, {"A": ["blocks.0.attn.qkv"]})) == 1
    with pytest.raises(InputError, match=r"layers\.A = 'tn.qkv'.*must match"):
        find_layers(model, {"A": ["tn.qkv"]})


def test_a_pattern_that_matches_nothing_is_named_with_what_is_close() -> None:
    with pytest.raises(
        InputError, match=r"layers\.QKV = 'attn\.\[qkv\]'.*did you mean 'attn\.qkv'"
    ) as raised:
        find_layers(tiny_vit(), {"MLP": [r"mlp\.fc\d"], "QKV": [r"attn.[qkv]"]})  # of the public 90 % recipe
    assert raised.value.key == "layers.QKV"


def test_a_model_of_other_names_asks_for_patterns() -> None:
    with pytest.raises(InputError, match="give patterns of its own"):
        find_layers(nn.Sequential(nn.Linear(3, 3)))


def test_a_pattern_that_is_no_regular_expression_is_named() -> None:
    with pytest.raises(InputError, match=r"layers\.A = '\('.*must be a regular expression"):
        find_layers(tiny_vit(), {"A": ["("]})


def test_a_layer_of_two_modules_is_refused() -> None:
    with pytest.raises(InputError, match=r"blocks\.0\.attn\.qkv\.weight already belongs to A"):
        find_layers(tiny_vit(), {"A": [r"attn\.qkv"], "B": [r"attn\.(qkv|proj)"]})
    twice = find_layers(tiny_vit(), {"A": [r"attn\.qkv", r"attn\.(qkv|proj)"]})
    assert len(twice) == 8  # within one module it is the same layer, once


@pytest.mark.parametrize("pruned", ["mlp.fc1", "head"])
def test_a_tied_weight_is_refused(pruned: str) -> None:
    model = tiny_vit()
    model.head = model.blocks[0].mlp.fc1
    with pytest.raises(InputError, match="tied weights cannot be pruned"):
        find_layers(model, {"A": [pruned]})


def test_biases_norms_and_tables_are_never_taken() -> None:
    model = tiny_swin()
    with pytest.raises(InputError):
        find_layers(model, {"A": [r"norm1"]})
    assert all(len(layer.shape) == 2 and layer.name.endswith(".weight") for layer in find_layers(model))
