"""Recognise checkpoints of Hugging Face's transformers library, and name timm's model of the same shape."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import timm

_NAMES = re.compile(r"(?:^|\.)encoder\.(?:layers?|stages?)\.\d+\.|(?:^|\.)embeddings\.")
_WIDTHS = {192: "tiny", 384: "small", 768: "base", 1024: "large", 1280: "huge", 1536: "giant"}
_CONVNEXT = {96: "tiny", 128: "base", 192: "large", 256: "xlarge"}
_CONVNEXTV2 = {
    40: "atto",
    48: "femto",
    64: "pico",
    80: "nano",
    96: "tiny",
    128: "base",
    192: "large",
    352: "huge",
}
_RESNETS = {(3, 4, 6, 3): 50, (3, 4, 23, 3): 101, (3, 8, 36, 3): 152, (2, 2, 2, 2): 18}
_NEAREST = 3
Config = Mapping[str, Any]


def transformers_model(config: Any) -> str | None:
    """Describe the model of a ``config.json`` of transformers, with timm's counterpart, for an error message.

    Returns:
        ``None`` if the file is not of transformers.
    """
    if not isinstance(config, Mapping) or "architecture" in config:
        return None
    kinds, kind = config.get("architectures"), config.get("model_type")
    if not kinds and not kind:
        return None
    name = str(kinds[0]) if isinstance(kinds, list) and kinds else str(kind)
    named = f"a checkpoint of the transformers library ({name}), whose weights have other names"
    return f"{named}; {_advice(config)}"


def transformers_config(path: Path) -> str | None:
    """:func:`transformers_model` of a file; ``None`` for a file that is no JSON."""
    try:
        return transformers_model(json.loads(path.read_text()))
    except ValueError:
        return None


def is_of_transformers(names: Iterable[str]) -> bool:
    """Return whether weights have the names that transformers gives them."""
    return any(_NAMES.search(name) for name in names)


def counterpart(config: Config) -> str | None:
    """Name of timm's model of the same shape, if there is one."""
    find = _FINDERS.get(str(config.get("model_type")))
    if find is None:
        return None
    try:
        name = find(config)
    except (KeyError, TypeError, IndexError):  # a value is missing, or of another type
        return None
    return name if timm.is_model(name) else None


def _advice(config: Config) -> str:
    name = counterpart(config)
    if name is not None:
        return f"timm's counterpart is {name} (model.architecture: {name}, pretrained: true)"
    kind = str(config.get("model_type") or "").split("_")[0].replace("-", "")
    near = timm.list_models(f"{kind}*")[:_NEAREST] if kind else []
    return f"take timm's own ({', '.join(near)} …)" if near else "timm has no model of that name"


def _vit(config: Config) -> str:
    size = _WIDTHS[config["hidden_size"]]
    return f"vit_{size}_patch{config.get('patch_size', 16)}_{config.get('image_size', 224)}"


def _deit(config: Config) -> str:
    taught = "WithTeacher" in str(config.get("architectures"))
    patch, image = config.get("patch_size", 16), config.get("image_size", 224)
    return f"deit_{_WIDTHS[config['hidden_size']]}{'_distilled' if taught else ''}_patch{patch}_{image}"


def _beit(config: Config) -> str:
    patch, image = config.get("patch_size", 16), config.get("image_size", 224)
    return f"beit_{_WIDTHS[config['hidden_size']]}_patch{patch}_{image}"


def _dinov2(config: Config) -> str:
    registers = "reg4_" if config.get("num_register_tokens") else ""
    return f"vit_{_WIDTHS[config['hidden_size']]}_patch{config.get('patch_size', 14)}_{registers}dinov2"


def _swin_size(config: Config) -> str:
    width, depth = config.get("embed_dim", 96), config.get("depths", [2, 2, 6, 2])[2]
    return {128: "base", 192: "large"}.get(width) or ("tiny" if depth == 6 else "small")


def _swin(config: Config) -> str:
    window, image = config.get("window_size", 7), config.get("image_size", 224)
    return f"swin_{_swin_size(config)}_patch4_window{window}_{image}"


def _swinv2(config: Config) -> str:
    return f"swinv2_{_swin_size(config)}_window{config.get('window_size', 8)}_{config.get('image_size', 256)}"


def _convnext(config: Config) -> str:
    size = _CONVNEXT[config.get("hidden_sizes", [96])[0]]
    deep = config.get("depths", [3, 3, 9, 3])[2] == 27
    return f"convnext_{'small' if size == 'tiny' and deep else size}"


def _convnextv2(config: Config) -> str:
    return f"convnextv2_{_CONVNEXTV2[config.get('hidden_sizes', [96])[0]]}"


def _resnet(config: Config) -> str:
    basic = config.get("layer_type") == "basic"
    depth = _RESNETS[tuple(config["depths"])]
    return f"resnet{34 if basic and depth == 50 else depth}"


def _levit(config: Config) -> str:
    width = config["hidden_sizes"][0]
    return f"levit_{width}{'s' if width == 128 and config['depths'][0] == 2 else ''}"


def _pvt_v2(config: Config) -> str:
    depths = tuple(config["depths"])
    wide = config["hidden_sizes"][0] > 32
    sizes = {(3, 4, 6, 3): 2, (3, 4, 18, 3): 3, (3, 8, 27, 3): 4, (3, 6, 40, 3): 5}
    return f"pvt_v2_b{sizes.get(depths, int(wide))}"


_FINDERS: Mapping[str, Callable[[Config], str]] = {
    "vit": _vit,
    "deit": _deit,
    "beit": _beit,
    "dinov2": _dinov2,
    "dinov2_with_registers": _dinov2,
    "swin": _swin,
    "swinv2": _swinv2,
    "convnext": _convnext,
    "convnextv2": _convnextv2,
    "resnet": _resnet,
    "levit": _levit,
    "pvt_v2": _pvt_v2,
}
