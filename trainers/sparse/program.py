"""A model as a list of operations on named buffers, as ``program.json`` of its folder holds it."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal

FORMAT, VERSION = "espalier-sparse", 1


@dataclass(frozen=True)
class Linear:
    """A linear layer, ``output = W input + bias``.

    Attributes:
        layer: names its tensors.
        input, output: buffers.
        residual: add to the output.
        gelu: apply GELU to the result.
        int8: the weights are bytes in blocks of 1 × 4, and the input was quantized.
    """

    layer: str
    input: str
    output: str
    residual: bool = False
    gelu: bool = False
    int8: bool = False
    kind: Literal["linear"] = "linear"


@dataclass(frozen=True)
class Quantize:
    """Quantization of the first ``inputs`` features to bytes, with a step and a zero point for each token."""

    input: str
    output: str
    inputs: int
    kind: Literal["quantize"] = "quantize"


@dataclass(frozen=True)
class LayerNorm:
    """LayerNorm over the features of each token."""

    layer: str
    input: str
    output: str
    epsilon: float
    kind: Literal["layer_norm"] = "layer_norm"


@dataclass(frozen=True)
class Attention:
    """Multi-head attention from ``input`` (queries, keys, values: 3 × heads × size features) to
    ``output``."""

    input: str
    output: str
    heads: int
    size: int
    scale: float
    kind: Literal["attention"] = "attention"


@dataclass(frozen=True)
class WindowAttention:
    """Multi-head attention within the windows of a grid of tokens, with a relative position bias.

    Args:
        layer: names its tensors: ``relative_position`` ``[heads, keys, queries]``, with the tokens of a
            window row by row; and ``padding``, the queries, keys and values of a token of zeros, which fills
            windows that reach beyond the grid, and is a key like others.
        window, shift: rows and columns.
    """

    layer: str
    input: str
    output: str
    heads: int
    size: int
    scale: float
    window: tuple[int, int]
    shift: tuple[int, int]
    kind: Literal["window_attention"] = "window_attention"


@dataclass(frozen=True)
class Patches:
    """The pixels of an image, one patch a token, channel by channel; prefix tokens get zeros."""

    output: str
    kind: Literal["patches"] = "patches"


@dataclass(frozen=True)
class Start:
    """The first values of every image's tokens (class token, position embedding): the tensor ``layer``,
    ``[tokens, features]``."""

    layer: str
    output: str
    kind: Literal["start"] = "start"


@dataclass(frozen=True)
class Merge:
    """Merging of two by two tokens of the last level into one token. Their features follow each other: upper
    left, lower left, upper right, lower right; beyond an odd edge there are zeros."""

    input: str
    output: str
    kind: Literal["merge"] = "merge"


@dataclass(frozen=True)
class Rows:
    """Output of the features of each token as a row of an array."""

    input: str
    kind: Literal["rows"] = "rows"


Operation = Linear | Quantize | LayerNorm | Attention | WindowAttention | Patches | Start | Merge | Rows
_KINDS: dict[str, Any] = {
    kind.kind: kind
    for kind in (Linear, Quantize, LayerNorm, Attention, WindowAttention, Patches, Start, Merge, Rows)
}


@dataclass(frozen=True)
class Level:
    """Operations on one grid of tokens.

    Args:
        grid: rows and columns of tokens in an image.
        operations: in order.
        prefix: tokens before those of the grid (class token, distillation token).
    """

    grid: tuple[int, int]
    operations: tuple[Operation, ...]
    prefix: int = 0

    @property
    def tokens(self) -> int:
        return self.prefix + self.grid[0] * self.grid[1]

    @property
    def apart(self) -> bool:
        """Return whether each image begins a tile of its own, as attention over all its tokens requires."""
        return any(isinstance(operation, (Attention, Start)) for operation in self.operations)


@dataclass(frozen=True)
class Program:
    """A vision transformer.

    Args:
        channels, height, width: of the images.
        patch: height and width of a patch, in pixels.
        buffers: features of each buffer (of the widest operation that writes it).
        local: buffers that are used within one tile, between two attentions, and that a thread keeps to
            itself; each other is written on one level only.
        levels: in order, with fewer tokens each; a plain vision transformer has one.
        output: the buffer that holds the features at the end.
        pool: ``token`` (the first), ``avg`` (the mean of the patches' tokens) or ``prefix`` (the mean of
            the logits of the prefix tokens, each with its own head: distilled DeiT).
        pool_norm: the epsilon of a LayerNorm after the pool, if there is one.
        classes: number of logits.
    """

    channels: int
    height: int
    width: int
    patch: tuple[int, int]
    buffers: dict[str, int]
    local: tuple[str, ...]
    levels: tuple[Level, ...]
    output: str
    pool: Literal["token", "avg", "prefix"]
    classes: int
    pool_norm: float | None = None
    preprocessing: dict[str, Any] = field(default_factory=dict)

    @property
    def operations(self) -> list[Operation]:
        """The operations of all levels."""
        return [operation for level in self.levels for operation in level.operations]


def to_json(program: Program) -> dict[str, Any]:
    """The program in JSON's types; :func:`from_json` reads it."""
    return {"format": FORMAT, "version": VERSION, **asdict(program)}


def from_json(text: str, where: str) -> Program:
    """Read and check a program that :func:`to_json` returned.

    Raises:
        ValueError: what is no such program, or one of another version.
    """
    try:
        data = json.loads(text)
        if data.pop("format") != FORMAT:
            raise KeyError("format")
        version = data.pop("version")
        if version != VERSION:
            raise ValueError(f"{where}: version {version} of the format, this reads version {VERSION}")
        levels = tuple(_level(entry) for entry in data.pop("levels"))
        known = {entry.name for entry in fields(Program)}
        kept = {name: value for name, value in data.items() if name in known}
        kept["patch"], kept["local"] = tuple(kept["patch"]), tuple(kept["local"])
        return Program(levels=levels, **kept)
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"{where}: no program of a sparse model ({error})") from error


def _level(data: dict[str, Any]) -> Level:
    operations = tuple(
        _KINDS[entry["kind"]](
            **{name: tuple(value) if isinstance(value, list) else value for name, value in entry.items()}
        )
        for entry in data["operations"]
    )
    return Level(tuple(data["grid"]), operations, data["prefix"])
