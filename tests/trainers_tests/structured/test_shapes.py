"""Widths that timm can hold: read, asked for, refused with the nearest, and built."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from helpers import quick
from hypothesis import given
from hypothesis import strategies as st
from image_tables import SWIN, SWIN_ARGS, VIT, VIT_ARGS
from torch import nn

from pruners.errors import InputError
from trainers.config.structured import StructuredSettings, format_cut
from trainers.structured.shapes import Shape, target_shape

A_VIT = Shape("vit", 192, (3,), (64,), (768,), (6,))
A_SWIN = Shape("swin", 48, (2, 4, 8), (24, 24, 24), (192, 384, 768), (2, 2, 4))


def built(architecture: str, **arguments: Any) -> nn.Module:
    with torch.device("meta"):
        model: nn.Module = timm.create_model(architecture, num_classes=3, **arguments)
    return model


def test_shapes__shapes_are_read_off_models() -> None:
    assert Shape.of(built(VIT, **VIT_ARGS)) == Shape("vit", 16, (2,), (8,), (64,), (2,))
    assert Shape.of(built(SWIN, **SWIN_ARGS)) == Shape("swin", 8, (2, 2), (4, 8), (32, 64), (1, 1))
    assert Shape.of(built("deit_tiny_distilled_patch16_224")).heads == (3,)


@pytest.mark.parametrize(
    "architecture",
    ["convnext_atto", "swinv2_tiny_window8_256", "xcit_nano_12_p16_224", "beit_base_patch16_224"],
)
def test_shapes__other_families_are_refused(architecture: str) -> None:
    with pytest.raises(InputError, match="only timm's ViT, DeiT and Swin"):
        Shape.of(built(architecture))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"qk_norm": True}, "other parts than timm's plain attention"),
        ({"mlp_layer": timm.layers.SwiGLU}, "other parts than timm's plain attention"),
        ({"block_fn": timm.models.vision_transformer.ParallelScalingBlock}, "other parts"),
        ({"global_pool": "map"}, "pools by attention"),
    ],
)
def test_shapes__parts_that_are_not_known_are_refused(change: dict[str, Any], says: str) -> None:
    with pytest.raises(InputError, match=says):
        Shape.of(built(VIT, **VIT_ARGS, **change))


def test_shapes__blocks_of_uneven_width_are_refused() -> None:
    model = built(VIT, **VIT_ARGS)
    block: Any = model.get_submodule("blocks.1")
    block.mlp = timm.layers.Mlp(16, 32, 16)
    with pytest.raises(InputError, match=r"blocks\.1.*other widths than the block before"):
        Shape.of(model)


@pytest.mark.parametrize(
    ("shape", "asked", "expected"),
    [
        (A_VIT, {"mlp": 0.75}, {"mlp": [768, 576]}),
        (A_VIT, {"mlp": 500}, {"mlp": [768, 500]}),
        (A_VIT, {"mlp": 0.0001}, {"mlp": [768, 1]}),
        (A_VIT, {"embed": 0.75}, {"embed": [192, 144], "head_dim": [64, 48]}),
        (A_VIT, {"embed": 128, "heads": 2}, {"embed": [192, 128], "heads": [3, 2]}),
        (A_VIT, {"embed": 128, "heads": 0.667}, {"embed": [192, 128], "heads": [3, 2]}),
        (A_VIT, {"embed": 128, "head_dim": 64}, {"embed": [192, 128], "heads": [3, 2]}),
        (
            A_VIT,
            {"embed": 96, "heads": 2, "head_dim": 48, "mlp": 0.5},
            {"embed": [192, 96], "heads": [3, 2], "head_dim": [64, 48], "mlp": [768, 384]},
        ),
        (A_SWIN, {"mlp": 0.75}, {"mlp": [[192, 384, 768], [144, 288, 576]]}),
        (A_SWIN, {"mlp": [1, 0.5, 100]}, {"mlp": [[192, 384, 768], [192, 192, 100]]}),
        (A_SWIN, {"heads": 0.5}, {"heads": [[2, 4, 8], [1, 2, 4]]}),
        (A_SWIN, {"heads": [2, 3, 4]}, {"heads": [[2, 4, 8], [2, 3, 4]]}),
        (A_SWIN, {"head_dim": 0.5}, {"head_dim": [24, 12]}),
        (A_SWIN, {"embed": 0.75}, {"embed": [48, 36]}),
    ],
)
def test_shapes__what_can_be_had(shape: Shape, asked: dict[str, Any], expected: dict[str, Any]) -> None:
    assert target_shape(shape, StructuredSettings(**asked)).differences(shape) == expected


@pytest.mark.parametrize(
    ("shape", "asked", "key", "says"),
    [
        (A_VIT, {"embed": 0.7}, "embed", "134 channels cannot be divided by 3 heads.*embed: 135"),
        (A_VIT, {"embed": 190}, "embed", "embed: 189"),
        (A_VIT, {"heads": 2}, "heads", r"embed: 128 too \(2 heads of 64\)"),
        (A_VIT, {"heads": 0.5}, "heads", "1.5 of 3 heads.*heads: 2, embed: 128"),
        (A_VIT, {"heads": [1, 2, 3, 3, 3, 3]}, "heads", "holds no list.*heads: 2, embed: 128"),
        (A_VIT, {"head_dim": 48}, "head_dim", r"embed: 144 too \(3 heads of 48\)"),
        (
            A_VIT,
            {"embed": 160, "heads": 2},
            "embed",
            "2 heads of at most 64 channels hold no 160.*embed: 128",
        ),
        (A_VIT, {"embed": 144, "head_dim": 24}, "embed", "needs 6 heads, and there are 3"),
        (A_VIT, {"embed": 96, "heads": 2, "head_dim": 32}, "head_dim", "nearest: head_dim: 48"),
        (A_VIT, {"mlp": [0.5] * 5 + [1.0]}, "mlp", "all 6 blocks of a ViT alike.*mlp: 448"),
        (A_VIT, {"mlp": 769}, "mlp", "at most 768.*mlp: 768"),
        (A_VIT, {"mlp": 768}, "", "nothing would be cut"),
        (A_SWIN, {"mlp": [0.5, 0.5]}, "mlp", "one for each of the 3 stages"),
        (A_SWIN, {"mlp": [1, 0.5, 1, 1, 1, 1, 1, 0.5]}, "mlp", r"no width of each block.*\[144, 384, 672\]"),
        (A_SWIN, {"heads": 0.4}, "heads", r"0.8 of 2 heads.*\[1, 2, 3\]"),
        (A_SWIN, {"heads": 3}, "heads", r"at most 2.*\[2, 3, 3\]"),
        (A_SWIN, {"embed": 49}, "embed", "at most 48"),
    ],
)
def test_shapes__what_cannot_is_refused_with_the_nearest(
    shape: Shape, asked: dict[str, Any], key: str, says: str
) -> None:
    with pytest.raises(InputError, match=says) as error:
        target_shape(shape, StructuredSettings(**asked))
    assert error.value.key == ".".join(filter(None, ("structured", key)))


@quick(200)
@given(st.integers(1, 1500), st.integers(1, 6000))
def test_shapes__timm_makes_exactly_the_hidden_channels(width: int, hidden: int) -> None:
    """``int(width * ratio)``, which 0.1 + 0.2 may bring one below."""
    shape = Shape("vit", width, (1,), (width,), (hidden,), (1,))
    assert int(width * shape.arguments({})["mlp_ratio"]) == hidden


@quick(8)
@given(st.integers(1, 3), st.integers(1, 8), st.integers(1, 70))
def test_shapes__a_vit_is_built_as_it_was_planned(heads: int, dim: int, hidden: int) -> None:
    shape = Shape("vit", heads * dim, (heads,), (dim,), (hidden,), (2,))
    assert Shape.of(built(VIT, **shape.arguments(VIT_ARGS))) == shape


@quick(8)
@given(
    st.integers(1, 9),
    st.tuples(st.integers(1, 3), st.integers(1, 3)),
    st.tuples(st.integers(1, 7), st.integers(1, 7)),
    st.tuples(st.integers(1, 40), st.integers(1, 70)),
)
def test_shapes__a_swin_is_built_as_it_was_planned(
    embed: int, heads: tuple[int, int], dims: tuple[int, int], hidden: tuple[int, int]
) -> None:
    shape = Shape("swin", embed, heads, dims, hidden, (1, 1))
    assert Shape.of(built(SWIN, **shape.arguments(SWIN_ARGS))) == shape


def test_shapes__a_cut_in_words() -> None:
    shape = target_shape(A_SWIN, StructuredSettings(heads=0.5, mlp=(0.5, 1, 1)))
    assert format_cut(shape.differences(A_SWIN)) == "heads 2/4/8 → 1/2/4, mlp 192/384/768 → 96/384/768"
