"""Which weights are found in timm's models, and each one's module and stage."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from functools import partial

import pytest
import timm
import torch
from helpers import tiny_swin, tiny_vit
from torch import nn
from torch.nn.utils import parametrizations, prune

from pruners import InputError, find_layers


def on_meta(name: str) -> nn.Module:
    with torch.device("meta"):
        model: nn.Module = timm.create_model(name)
    return model


def test_layers__swin_modules_stages_and_order() -> None:
    layers = find_layers(on_meta("swin_tiny_patch4_window7_224"))
    assert Counter(layer.module for layer in layers) == {"QKV": 12, "PRJ": 12, "MLP": 24}
    assert Counter(layer.stage for layer in layers) == {0: 8, 1: 8, 2: 24, 3: 8}
    assert [layer.name for layer in layers[:4]] == [
        f"layers.0.blocks.0.{tail}.weight" for tail in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    ]
    assert layers[0].shape == (288, 96)
    assert layers[0].numel == 288 * 96
    assert not [layer.name for layer in layers if "downsample" in layer.name or "head" in layer.name]


def test_layers__an_isotropic_model_is_cut_into_four_equal_groups_of_blocks() -> None:
    layers = find_layers(on_meta("deit_tiny_patch16_224"))
    blocks = {int(layer.name.split(".")[1]): layer.stage for layer in layers}
    assert blocks == {block: block // 3 for block in range(12)}
    assert Counter(layer.module for layer in layers) == {"QKV": 12, "PRJ": 12, "MLP": 24}


def test_layers__patterns_of_oViT_for_resnet() -> None:
    layers = find_layers(
        on_meta("resnet50d"), {"CONV": [r"conv1\.(3|6)", r"layer\d\.\d\.(conv\d|downsample.1)"]}
    )
    assert len(layers) == 2 + 16 * 3 + 4
    assert {layer.name for layer in layers} >= {"conv1.3.weight", "layer1.0.downsample.1.weight"}
    # the stem has no stage of its own: it joins the first
    assert Counter(layer.stage for layer in layers) == {0: 2 + 9 + 1, 1: 12 + 1, 2: 18 + 1, 3: 9 + 1}


def test_layers__layers_outside_the_blocks_join_their_neighbour() -> None:
    layers = find_layers(on_meta("xcit_nano_12_p16_224"))
    stage_of = {layer.name: layer.stage for layer in layers}
    assert stage_of["blocks.0.mlp.fc1.weight"] == 0
    assert {stage for name, stage in stage_of.items() if name.startswith("cls_attn_blocks")} == {3}


def test_layers__a_pattern_matches_whole_names_only() -> None:
    model = tiny_vit()
    assert len(find_layers(model, {"A": ["blocks.0.attn.qkv"]})) == 1
    with pytest.raises(InputError, match=r"layers\.A = 'tn.qkv'.*must match"):
        find_layers(model, {"A": ["tn.qkv"]})


def test_layers__a_pattern_that_matches_nothing_is_named_with_what_is_close() -> None:
    with pytest.raises(
        InputError, match=r"layers\.QKV = 'attn\.\[qkv\]'.*did you mean 'attn\.qkv'"
    ) as raised:
        find_layers(tiny_vit(), {"MLP": [r"mlp\.fc\d"], "QKV": [r"attn.[qkv]"]})  # of the public 90 % recipe
    assert raised.value.key == "layers.QKV"


def test_layers__a_model_of_other_names_asks_for_patterns() -> None:
    with pytest.raises(InputError, match=r"layers = 'Sequential'.*give patterns of its own"):
        find_layers(nn.Sequential(nn.Linear(3, 3)))


class Half(nn.Module):
    """An attention whose query, key and value no name gives away."""

    def __init__(self) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.zeros(24, 8))
        self.proj = nn.Linear(8, 8)


class Pooling(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(8, 8)])


class SomeAttention(Pooling):
    """An attention by its class, under a name that says nothing."""


@pytest.mark.parametrize(
    ("path", "part", "named"),
    [
        ("blocks.1.attn.gate", nn.Linear(8, 8), "blocks.1.attn.gate.weight"),
        ("blocks.1.mlp.extra", nn.Conv1d(8, 8, 1), "blocks.1.mlp.extra.weight"),
        ("blocks.2.adapter", nn.Linear(8, 8), "blocks.2.adapter.weight"),
        ("pool", SomeAttention(), "pool.blocks.0.weight"),
        ("blocks.3.attn", Half(), "blocks.3.attn"),
    ],
)
def test_layers__a_part_that_no_pattern_takes_is_named_rather_than_skipped(
    path: str, part: nn.Module, named: str
) -> None:
    model = tiny_vit()
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, part)
    with pytest.raises(InputError, match=r"known by .* names?: give patterns") as raised:
        find_layers(model)
    assert raised.value.value == named
    assert len(find_layers(model, {"QKV": [r"attn\.qkv"]})) in (
        3,
        4,
    )  # patterns of one's own say what is meant


def test_layers__what_is_outside_attention_and_mlp_stays_dense_without_a_word() -> None:
    model = tiny_vit()
    model.neck = Pooling()
    assert len(find_layers(model)) == 16


@pytest.mark.parametrize("patterns", [None, {"QKV": [r"attn\.qkv"]}])
@pytest.mark.parametrize(
    ("wrap", "parameter"),
    [
        (parametrizations.orthogonal, "parametrizations.weight.original"),
        (parametrizations.weight_norm, "parametrizations.weight.original1"),
        (partial(prune.identity, name="weight"), "weight_orig"),
    ],
)
def test_layers__a_weight_computed_from_others_is_refused_by_name(
    wrap: Callable[[nn.Module], object], parameter: str, patterns: dict[str, list[str]] | None
) -> None:
    model = tiny_vit()
    wrap(model.blocks[1].attn.qkv)
    with pytest.raises(InputError, match=r"blocks\.1\.attn\.qkv\.weight is computed from it") as raised:
        find_layers(model, patterns)
    assert raised.value.value == f"blocks.1.attn.qkv.{parameter}"
    assert len(find_layers(model, {"MLP": [r"mlp\.fc\d"]})) == 8


class Encoder(nn.Module):
    def __init__(self, **kwargs: int) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(8, 2, **kwargs)


@pytest.mark.parametrize("tied", [False, True])
def test_layers__the_weights_of_torchs_own_attention_are_candidates(tied: bool) -> None:
    layers = find_layers(Encoder())
    assert [(layer.name, layer.module) for layer in layers] == [
        ("attn.in_proj_weight", "QKV"),
        ("attn.out_proj.weight", "PRJ"),
    ]
    apart = Encoder(kdim=4, vdim=4)
    if tied:
        apart.attn.v_proj_weight = apart.attn.k_proj_weight
        with pytest.raises(
            InputError, match=r"attn\.v_proj_weight.*shares its weight with attn\.k_proj_weight"
        ):
            find_layers(apart)
    else:
        assert [layer.shape for layer in find_layers(apart)] == [(8, 8), (8, 4), (8, 4), (8, 8)]
        assert len(find_layers(apart, {"A": [r"attn\.(q|k|v)_proj"]})) == 3


def test_layers__torchs_own_encoder_is_isotropic() -> None:
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16), 8, enable_nested_tensor=False)
    layers = find_layers(encoder)
    assert Counter(layer.module for layer in layers) == {"QKV": 8, "PRJ": 8, "MLP": 16}
    assert {layer.name.split(".")[1]: layer.stage for layer in layers} == {str(i): i // 2 for i in range(8)}


@pytest.mark.parametrize(
    ("names", "stages"),
    [
        ([f"layers.{i}.blocks.0.mlp.fc1" for i in range(6)], [0, 1, 2, 3, 4, 5]),
        (["stem.0", "layer1.0.conv1", "layer4.11.conv2", "head"], [0, 0, 1, 1]),
        (["blocks.0.0.conv_pw", "blocks.6.1.conv_pw", "blocks.3.0.conv_pw"], [0, 2, 1]),
        (["stages.0.blocks.0.mlp.fc1", "stages.1.downsample.attn.k.conv"], [0, 1]),
        (["levels.1.transformer_encoder.0.attn.q", "levels.2.pool.conv"], [0, 1]),
        (["backbone.layers.0.blocks.0.attn.q", "backbone.layers.2.downsample.reduction"], [0, 1]),
        (["blocks.0.attns.0.qkv", "blocks.1.attns.0.qkv", "blocks.7.attns.1.qkv"], [0, 0, 1]),
        (["blocks.0.mlp.0", "blocks.1.mlp.0", "blocks.2.mlp.0", "token_blocks.0.mlp.0"], [0, 1, 2, 2]),
        (["vit.encoder.layer.0.mlp.fc1", "vit.encoder.layer.5.mlp.fc1"], [0, 1]),
    ],
)
def test_layers__stages_by_the_names_of_lists(names: list[str], stages: list[int]) -> None:
    root = nn.Module()
    for name in names:  # as deep as it says, a Linear at its end
        *path, last = name.split(".")
        parent = root
        for part in path:
            if not hasattr(parent, part):
                parent.add_module(part, nn.Module())
            parent = parent.get_submodule(part)
        parent.add_module(last, nn.Linear(2, 2))
    stage_of = {layer.name: layer.stage for layer in find_layers(root, {"ALL": [".*"]})}
    assert [stage_of[f"{name}.weight"] for name in names] == stages


def test_layers__a_pattern_that_is_no_regular_expression_is_named() -> None:
    with pytest.raises(InputError, match=r"layers\.A = '\('.*must be a regular expression"):
        find_layers(tiny_vit(), {"A": ["("]})


def test_layers__a_layer_of_two_modules_is_refused() -> None:
    with pytest.raises(InputError, match=r"blocks\.0\.attn\.qkv\.weight already belongs to A"):
        find_layers(tiny_vit(), {"A": [r"attn\.qkv"], "B": [r"attn\.(qkv|proj)"]})
    twice = find_layers(tiny_vit(), {"A": [r"attn\.qkv", r"attn\.(qkv|proj)"]})
    assert len(twice) == 8  # within one module it is the same layer, once


@pytest.mark.parametrize("pruned", ["mlp.fc1", "head"])
def test_layers__a_tied_weight_is_refused(pruned: str) -> None:
    model = tiny_vit()
    model.head = model.blocks[0].mlp.fc1
    with pytest.raises(InputError, match="tied weights cannot be pruned"):
        find_layers(model, {"A": [pruned]})


def test_layers__biases_norms_and_tables_are_never_taken() -> None:
    model = tiny_swin()
    with pytest.raises(InputError):
        find_layers(model, {"A": [r"norm1"]})
    assert all(len(layer.shape) == 2 and layer.name.endswith(".weight") for layer in find_layers(model))
