"""Widths of timm's ViT and Swin: of a model, of the smaller one that a recipe asks for, and timm's arguments.

timm can build, for a ViT, one MLP width and one embedding width for all blocks, and heads that divide the
embedding; for a Swin, an embedding width that doubles with each stage, and for each stage an MLP width,
heads, and channels of a head. Anything else is refused, with the nearest shape that is possible.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from timm.layers import Attention, Mlp
from timm.models.swin_transformer import SwinTransformer, WindowAttention
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from pruners.errors import InputError
from trainers.config.structured import StructuredSettings, Width, is_reduced

_KEY = "structured"
_HEAD_TOLERANCE = 0.01  # the largest distance of a share of heads (0.667) from a whole number of heads


@dataclass(frozen=True)
class Shape:
    """Widths of a model; tuples have an entry for each stage, of which a ViT has one.

    Attributes:
        family: ``vit`` (DeiT too) or ``swin``.
        embed: channels between the blocks of the first stage; they double with each stage.
        heads: attention heads.
        head_dim: channels of a head.
        hidden: hidden channels of the MLPs.
        depths: number of blocks.
    """

    family: Literal["vit", "swin"]
    embed: int
    heads: tuple[int, ...]
    head_dim: tuple[int, ...]
    hidden: tuple[int, ...]
    depths: tuple[int, ...]

    @classmethod
    def of(cls, model: nn.Module) -> Shape:
        """The widths of a model.

        Raises:
            InputError: the model is no plain ViT, DeiT or Swin of timm.
        """
        if isinstance(model, SwinTransformer):
            family: Literal["vit", "swin"] = "swin"
            stages: list[Sequence[nn.Module]] = [list(stage.blocks) for stage in model.layers]
        elif isinstance(model, VisionTransformer):
            family, stages = "vit", [list(model.blocks)]
        else:
            raise InputError(_KEY, type(model).__name__, "only timm's ViT, DeiT and Swin can be cut in width")
        blocks: list[Any] = [block for stage in stages for block in stage]
        for number, block in enumerate(blocks):
            _check_plain(model, number, block)
        first: list[Any] = [stage[0] for stage in stages]
        shape = cls(
            family,
            int(model.embed_dim),
            tuple(block.attn.num_heads for block in first),
            tuple(block.attn.proj.in_features // block.attn.num_heads for block in first),
            tuple(block.mlp.fc1.out_features for block in first),
            tuple(map(len, stages)),
        )
        for (name, stage), block in zip(shape.blocks(), blocks, strict=True):
            widths = block.attn.num_heads, block.attn.proj.in_features, block.mlp.fc1.out_features
            if widths != (shape.heads[stage], shape.inner[stage], shape.hidden[stage]):
                raise InputError(_KEY, name, "has other widths than the block before it; cannot be cut")
        return shape

    @property
    def widths(self) -> tuple[int, ...]:
        """The embedding width of each stage."""
        return tuple(self.embed << stage for stage in range(len(self.depths)))

    @property
    def inner(self) -> tuple[int, ...]:
        """Channels inside the attentions of each stage: heads times those of a head."""
        return tuple(heads * dim for heads, dim in zip(self.heads, self.head_dim, strict=True))

    def blocks(self) -> Iterator[tuple[str, int]]:
        """(name, stage) of each block, in order."""
        for stage, depth in enumerate(self.depths):
            for number in range(depth):
                swin = f"layers.{stage}.blocks.{number}"
                yield (swin if self.family == "swin" else f"blocks.{number}"), stage

    def arguments(self, before: Mapping[str, Any]) -> dict[str, Any]:
        """timm's keyword arguments for this shape, over those (``before``) of the model that is cut."""
        ratios = tuple(map(_ratio, self.hidden, self.widths))
        own: dict[str, Any]
        if self.family == "vit":
            own = {"embed_dim": self.embed, "num_heads": self.heads[0], "mlp_ratio": ratios[0]}
        else:
            own = {
                "embed_dim": self.embed,
                "num_heads": list(self.heads),
                "head_dim": _one_or_list(self.head_dim),
                "mlp_ratio": _one_or_list(ratios),
            }
        return {**before, **own}

    def differences(self, before: Shape) -> dict[str, list[Any]]:
        """The cut widths: kind -> [before, after], each a number, or a list with one for each stage."""
        changes = {"embed": [before.embed, self.embed]}
        for kind, name in (("heads", "heads"), ("head_dim", "head_dim"), ("mlp", "hidden")):
            changes[kind] = [_one_or_list(getattr(shape, name)) for shape in (before, self)]
        return {kind: ends for kind, ends in changes.items() if ends[0] != ends[1]}


def target_shape(shape: Shape, settings: StructuredSettings) -> Shape:
    """The shape that a recipe asks for.

    Args:
        shape: of the model that is cut.
        settings: the widths.

    Raises:
        InputError: a shape that timm cannot build (names the nearest one that it can), one that is wider, or
            the same one.
    """
    find = _vit if shape.family == "vit" else _swin
    target = find(shape, settings)
    if target == shape:
        expected = f"leaves the model as it is: nothing would be cut ({_widths_text(shape)})"
        raise InputError(_KEY, None, expected)
    return target


def _vit(shape: Shape, settings: StructuredSettings) -> Shape:
    hidden = _of_blocks("mlp", settings.mlp, shape.hidden[0], shape.depths[0])
    most, dim = shape.heads[0], shape.head_dim[0]
    heads = _of_blocks("heads", settings.heads, most, shape.depths[0], dim)
    each = _of_blocks("head_dim", settings.head_dim, dim, shape.depths[0])
    if not is_reduced(settings.embed):
        if heads * each != shape.embed:
            key = "heads" if is_reduced(settings.heads) else "head_dim"
            expected = (
                f"timm's ViT has an embedding of heads × head_dim channels, here {shape.embed}; the nearest "
                f"shape that it can hold: embed: {heads * each} too ({heads} heads of {each})"
            )
            raise InputError(f"{_KEY}.{key}", getattr(settings, key), expected)
        embed = shape.embed
    else:
        embed = _size("embed", settings.embed, shape.embed)
        if is_reduced(settings.head_dim) and not is_reduced(settings.heads) and embed % each == 0:
            heads = embed // each
        if embed % heads or embed // heads > dim or heads > most:
            raise InputError(f"{_KEY}.embed", settings.embed, _nearest_embed(embed, heads, shape))
        if is_reduced(settings.head_dim) and each != embed // heads:
            expected = (
                f"{heads} heads of {each} make an embedding of {heads * each}, not of {embed}; nearest: "
            )
            raise InputError(f"{_KEY}.head_dim", settings.head_dim, f"{expected}head_dim: {embed // heads}")
        each = embed // heads
    return Shape("vit", embed, (heads,), (each,), (hidden,), shape.depths)


def _nearest_embed(embed: int, heads: int, shape: Shape) -> str:
    """An error message: why heads cannot divide an embedding, and the nearest width that they can."""
    most, dim = shape.heads[0], shape.head_dim[0]
    if heads > most:
        return f"needs {heads} heads, and there are {most}; the nearest shape: embed: {most * dim}"
    if embed > heads * dim:
        why = f"{heads} heads of at most {dim} channels hold no {embed}"
        return f"{why}; the nearest shape that timm's ViT can hold: embed: {heads * dim}"
    near = min(max(round(embed / heads), 1), dim) * heads
    return (
        f"{embed} channels cannot be divided by {heads} heads; the nearest shape that timm's ViT can hold: "
        f"embed: {near} (a share of {near / shape.embed:.4g})"
    )


def _swin(shape: Shape, settings: StructuredSettings) -> Shape:
    return Shape(
        "swin",
        _size("embed", settings.embed, shape.embed),
        _of_stages("heads", settings.heads, shape.heads, shape.depths),
        _of_stages("head_dim", settings.head_dim, shape.head_dim, shape.depths),
        _of_stages("mlp", settings.mlp, shape.hidden, shape.depths),
        shape.depths,
    )


def _of_blocks(
    key: str, value: Width | tuple[Width, ...], whole: int, depth: int, dim: int | None = None
) -> int:
    """A ViT's width, the same in all blocks.

    Args:
        dim: channels of a head, if ``key`` is ``heads``, for the embedding that goes with them.
    """
    expected = f"timm builds all {depth} blocks of a ViT alike, and holds no list"
    try:
        if not isinstance(value, tuple):
            return _size(key, value, whole)
        near = round(sum(_near(width, whole) for width in value) / len(value))
    except InputError as error:
        assert not isinstance(value, tuple), "a list has not been tried"
        near, expected = _near(value, whole), error.expected
    together = f", embed: {near * dim}" if dim else ""
    given = list(value) if isinstance(value, tuple) else value
    expected += f"; the nearest shape that can be had: {key}: {near}{together}"
    raise InputError(f"{_KEY}.{key}", given, expected)


def _of_stages(
    key: str, value: Width | tuple[Width, ...], whole: tuple[int, ...], depths: tuple[int, ...]
) -> tuple[int, ...]:
    """A Swin's widths, the same in all blocks of a stage."""
    values = value if isinstance(value, tuple) else (value,) * len(depths)
    if len(values) != len(depths):
        expected = f"must be one number, or one for each of the {len(depths)} stages"
        if len(values) == sum(depths):
            near = _means(values, whole, depths)
            expected += f": timm holds no width of each block; the nearest shape that it can: {key}: {near}"
        raise InputError(f"{_KEY}.{key}", list(values), expected)
    try:
        return tuple(_size(key, width, most) for width, most in zip(values, whole, strict=True))
    except InputError as error:
        near = [_near(width, most) for width, most in zip(values, whole, strict=True)]
        given = list(value) if isinstance(value, tuple) else value
        raise InputError(error.key, given, f"{error.expected}; the nearest shape: {key}: {near}") from None


def _means(values: Sequence[Width], whole: Sequence[int], depths: Sequence[int]) -> list[int]:
    """The mean width of each stage's blocks."""
    means, begin = [], 0
    for most, depth in zip(whole, depths, strict=True):
        means.append(round(sum(_near(width, most) for width in values[begin : begin + depth]) / depth))
        begin += depth
    return means


def _near(value: Width, whole: int) -> int:
    """A width as a number, at least 1 and at most ``whole``."""
    return max(1, min(whole, value if isinstance(value, int) else round(value * whole)))


def _size(key: str, value: Width, whole: int) -> int:
    """A width as a number; a share of channels is rounded, a share of heads must give a whole number.

    Raises:
        InputError: more than the model has, or a part of a head.
    """
    if isinstance(value, int) and value > whole:
        raise InputError(f"{_KEY}.{key}", value, f"must be at most {whole}, which is what the model has")
    if (
        key == "heads"
        and isinstance(value, float)
        and abs(value * whole - _near(value, whole)) > _HEAD_TOLERANCE
    ):
        expected = f"leaves {value * whole:.4g} of {whole} heads, which is no whole number"
        raise InputError(f"{_KEY}.{key}", value, expected)
    return _near(value, whole)


def _ratio(hidden: int, width: int) -> float:
    """The ``mlp_ratio`` from which timm computes exactly ``hidden``, as ``int(width * ratio)``."""
    ratio = hidden / width
    if int(width * ratio) != hidden:
        ratio = math.nextafter(ratio, math.inf)
    assert int(width * ratio) == hidden, "the next number is never below"
    return ratio


def _one_or_list(values: Sequence[Any]) -> Any:
    return values[0] if len(set(values)) == 1 else list(values)


def _widths_text(shape: Shape) -> str:
    return f"embed {shape.embed}, heads {_one_or_list(shape.heads)}, mlp {_one_or_list(shape.hidden)}"


def _check_plain(model: nn.Module, number: int, block: Any) -> None:
    """Check that a block has only parts whose channels can be cut.

    Raises:
        InputError: it has others.
    """
    attention, mlp = getattr(block, "attn", None), getattr(block, "mlp", None)
    plain = type(attention) in (Attention, WindowAttention) and type(mlp) is Mlp
    for part in ("q_norm", "k_norm", "norm", "gate"):
        inside = getattr(attention, part, None)
        plain = plain and (inside is None or isinstance(inside, nn.Identity))
    if not plain or not isinstance(getattr(mlp, "norm", nn.Identity()), nn.Identity):
        expected = (
            f"block {number} has other parts than timm's plain attention and MLP; cannot be cut in width"
        )
        raise InputError(_KEY, type(model).__name__, expected)
    if getattr(model, "attn_pool", None) is not None:
        raise InputError(_KEY, type(model).__name__, "pools by attention; cannot be cut in width")
