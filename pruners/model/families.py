"""The prunable weights of timm's model families, as a table of name patterns.

Patterns are regular expressions on the end of a weight's name without ``.weight``. The choice follows DIMAP
and oViT: attention and MLP of transformers, the convolutions inside blocks of other models. Stems, changes of
resolution between stages, heads, norms, biases and position tables stay dense.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

Patterns = Mapping[str, tuple[str, ...]]

ATTENTION = r"[^.]*(?:attn|attention|token_mixer)[^.]*"
_MLP = r"(?:mlp|ffn|feed_forward)[^.]*"
_BLOCK = r"^(?:.*\.)?(?:\w+_)?blocks\.\d+\."

_TRANSFORMER: Patterns = {
    "QKV": (rf"{ATTENTION}\.(?:qkv|in_proj|qk|kv|[qkv]|w[qkv]|q?kv_proj|[qkv]_proj|query|key|value)",),
    "PRJ": (rf"{ATTENTION}\.(?:out_)?proj",),
    # fc1_g, fc1_x, w12, w1 … are gated forms (GLU, SwiGLU); the last two are names of torch and torchvision
    "MLP": (rf"{_MLP}\.(?:fc\d|fc1_[gx]|w12|w\d)", r"layers\.\d+\.linear[12]", r"mlp\.\d"),
}

_DEPTHWISE = "depthwise: few weights for many outputs; DIMAP and oViT prune none"
_TALKING = "mixes the heads: heads × heads weights"
_POSITION = "makes the position bias out of coordinates, not of the image"
_TOO_FEW = "a handful of weights for a whole layer's channels"


@dataclass(frozen=True)
class Family:
    """Models whose weights have the same names.

    Attributes:
        classes: names of timm's classes; subclasses belong to the family too.
        patterns: for each module the patterns of its layers; every model has layers of the first module.
        inside: where every weight must match ``patterns`` or ``dense``; any other weight is an error.
        dense: patterns of weights that stay dense although they are ``inside``, each with the reason; they
            go before ``patterns``.
    """

    classes: tuple[str, ...]
    patterns: Patterns
    inside: str
    dense: Mapping[str, str]


_PARTS = rf"(?:^|\.)(?:{ATTENTION}|{_MLP})(?:\.|$)"

ANY_TRANSFORMER = Family(
    classes=(),
    patterns=_TRANSFORMER,
    inside=_PARTS,
    dense={
        r"(?:rel_pos\.mlp|cpb_mlp|meta_mlp)\.(?:fc)?\d|pos_proj": _POSITION,
        r"\w*dw\w*|pool_[qkv]": _DEPTHWISE,
        r"talking_head\d|proj_[lw]": _TALKING,
        r"shortcut_proj_attn": "the shortcut where the width changes: patch merging by another name",
    },
)
"""For models of no known family: the usual names. What is neither attention nor MLP stays dense."""

FAMILIES = (
    # ViT, DeiT (and distilled), Swin: the patterns of the papers
    Family(
        classes=("VisionTransformer", "SwinTransformer"),
        patterns=_TRANSFORMER,
        inside=rf"^(?:layers\.\d+\.)?blocks\.\d+\.|{_PARTS}",
        dense={},
    ),
    Family(
        classes=("SwinTransformerV2",),
        patterns=_TRANSFORMER,
        inside=rf"{_BLOCK}|{_PARTS}",
        dense={r"attn\.cpb_mlp\.\d": _POSITION},
    ),
    Family(
        classes=("Xcit",),  # the class attention has separate q, k and v
        patterns=_TRANSFORMER,
        inside=rf"{_BLOCK}|{_PARTS}",
        dense={r"local_mp\.conv\d": _DEPTHWISE},
    ),
    Family(
        classes=("EfficientFormer",),  # fc1 and fc2 are 1×1 convolutions in all but the last blocks
        patterns={"QKV": (r"token_mixer\.qkv",), "PRJ": (r"token_mixer\.proj",), "MLP": (r"mlp\.fc[12]",)},
        inside=rf"{_BLOCK}|{_PARTS}",
        dense={},
    ),
    Family(
        classes=("EfficientFormerV2",),
        patterns={
            # the first attention of the last stage halves the resolution; its query has two convolutions
            "QKV": (r"(?:token_mixer|attn)\.[qkv]\.conv", r"attn\.q\.proj\.conv"),
            "PRJ": (r"(?:token_mixer|attn)\.proj\.conv",),
            "MLP": (r"mlp\.fc[12]\.conv",),
        },
        inside=rf"{_BLOCK}|{_PARTS}",
        dense={
            r"mlp\.mid\.conv|(?:v_local|stride_conv)\.conv|q\.local": _DEPTHWISE,
            r"talking_head[12]": _TALKING,
        },
    ),
    Family(
        classes=("Levit", "LevitDistilled"),  # each linear layer lies in a module with a batch norm
        patterns={
            "QKV": (r"attn\.qkv\.linear", r"attn_downsample\.(?:kv|q\.ln)\.linear"),
            "PRJ": (r"attn(?:_downsample)?\.proj\.ln\.linear",),
            "MLP": (r"mlp\.ln[12]\.linear",),
        },
        inside=rf"{_BLOCK}|{_PARTS}|\.downsample\.",
        dense={},
    ),
    Family(
        classes=("PyramidVisionTransformerV2", "Twins"),
        patterns={**_TRANSFORMER, "SR": (r"attn\.sr",)},  # a convolution reduces keys and values
        inside=rf"{_BLOCK}|{_PARTS}",
        dense={r"mlp\.dwconv": _DEPTHWISE},
    ),
    Family(
        classes=("VOLO",),  # outlook attention has a linear layer ``attn`` that computes its weights
        patterns={**_TRANSFORMER, "QKV": (r"attn\.(?:qkv|kv|q|v|attn)",)},
        inside=rf"^(?:network\.\d+\.\d+|post_network\.\d+)\.|{_PARTS}",
        dense={},
    ),
    Family(
        classes=("EdgeNeXt",),
        patterns={"QKV": (r"xca\.qkv",), "PRJ": (r"xca\.proj",), "MLP": (r"mlp\.fc[12]",)},
        inside=_BLOCK,
        dense={r"conv_dw|convs\.\d+": _DEPTHWISE, r"pos_embd\.token_projection": _POSITION},
    ),
    Family(
        classes=("NextViT",),  # attention by grouped convolutions, and by e_mhsa at a lower resolution
        patterns={
            "QKV": (r"e_mhsa\.[qkv]",),
            "PRJ": (r"e_mhsa\.proj", r"mhca\.projection", r"blocks\.\d+\.projection\.conv"),
            "MLP": (r"mlp\.fc[12]",),
            "CONV": (r"mhca\.group_conv3x3",),
        },
        inside=_BLOCK,
        dense={r"patch_embed\.conv": "changes the width: as between the stages"},
    ),
    Family(
        classes=("CoaT",),
        patterns={
            "QKV": (r"factoratt_crpe\d?\.qkv",),
            "PRJ": (r"factoratt_crpe\d?\.proj",),
            "MLP": (r"mlp\d?\.fc[12]",),
        },
        inside=r"(?:^|\.)(?:serial|parallel)_blocks\d?\.\d+\.",
        dense={
            r"(?:cpe|crpe)\d?\.(?:conv_list\.\d+|proj)": _DEPTHWISE,
            r"parallel_blocks\.\d+\.mlp\d\.fc[12]": "one MLP for several resolutions: tied weights",
        },
    ),
    Family(
        classes=("ConvNeXt",),
        patterns={"MLP": (r"mlp\.fc[12]",)},  # Linear, or in some variants 1×1 convolutions
        inside=_BLOCK,
        dense={r"conv_dw": _DEPTHWISE, r"shortcut\.conv": "changes the width: as between the stages"},
    ),
    Family(
        classes=("ResNet",),
        patterns={
            "CONV": (
                r"conv1\.[36]",  # of deep stems; the first convolution sees the image
                r"layer\d\.\d+\.(?:conv\d(?:\.conv|\.paths\.\d+\.conv)?|convs\.\d+|downsample\.\d)",
            ),
            "SE": (r"layer\d\.\d+\.(?:se\.fc\d|conv\d\.fc\d|conv\d\.attn\.fc_\w+)",),
        },
        inside=r"^layer\d\.\d+\.",
        dense={r"se\.conv": _TOO_FEW},  # ECA
    ),
    Family(
        classes=("EfficientNet",),
        patterns={
            "CONV": (r"blocks\.\d+\.\d+\.conv(?:_(?:exp|pw|pwl|s2d))?(?:\.\d+)?", r"conv_head"),
            "SE": (r"se\.conv_(?:reduce|expand|attn)", r"se\.mlp_\w+\.fc\d"),
        },
        inside=r"^blocks\.\d+\.\d+\.",
        dense={
            r"conv_dw(?:\.\d+)?": _DEPTHWISE,
            r"routing_fn": _TOO_FEW,
            r"se\.conv": _TOO_FEW,  # ECA
        },
    ),
)


def family_of(model: nn.Module) -> Family:
    """The family of a timm model by its class, or :data:`ANY_TRANSFORMER`.

    A class of the same name in another library does not count: its weights have other names.
    """
    names = {kind.__name__ for kind in type(model).__mro__ if kind.__module__.split(".")[0] == "timm"}
    return next((family for family in FAMILIES if names & set(family.classes)), ANY_TRANSFORMER)
