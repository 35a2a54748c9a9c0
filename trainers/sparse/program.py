"""A model as a list of operations on named buffers, as ``program.json`` of its folder holds it."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal

FORMAT, VERSION = "espalier-sparse", 1


@dataclass(frozen=True)
class Linear:
    """``output = W input + bias``, added to what the output holds with ``residual``, with GELU after it with
    ``gelu``; ``layer`` names its tensors. With ``int8`` the weights are bytes in blocks of 1 × 4 and the
    input was quantized."""

    layer: str
    input: str
    output: str
    residual: bool = False
    gelu: bool = False
    int8: bool = False
    kind: Literal["linear"] = "linear"


@dataclass(frozen=True)
class Quantize:
    """The first ``inputs`` features of each token in bytes, with the token's own step and zero point."""

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


Operation = Linear | Quantize | LayerNorm | Attention
_KINDS: dict[str, type[Linear] | type[Quantize] | type[LayerNorm] | type[Attention]] = {
    "quantize": Quantize,
    "linear": Linear,
    "layer_norm": LayerNorm,
    "attention": Attention,
}


@dataclass(frozen=True)
class Program:
    """A vision transformer.

    Args:
        channels, height, width: of the images.
        patch: height and width of a patch, in pixels.
        prefix: tokens before those of the patches (class token, distillation token).
        buffers: features of each buffer. ``patches`` holds the images' pixels, one patch a token, and
            ``stream`` begins with the position embedding; both exist in every program.
        local: buffers that are used within one tile, between two attentions, and that a thread keeps to
            itself.
        operations: in order.
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
    prefix: int
    buffers: dict[str, int]
    local: tuple[str, ...]
    operations: tuple[Operation, ...]
    output: str
    pool: Literal["token", "avg", "prefix"]
    classes: int
    pool_norm: float | None = None
    preprocessing: dict[str, Any] = field(default_factory=dict)

    @property
    def grid(self) -> tuple[int, int]:
        return self.height // self.patch[0], self.width // self.patch[1]

    @property
    def tokens(self) -> int:
        return self.prefix + self.grid[0] * self.grid[1]


def to_json(program: Program) -> dict[str, Any]:
    """The program as JSON writes it."""
    return {"format": FORMAT, "version": VERSION, **asdict(program)}


def from_json(text: str, where: str) -> Program:
    """The inverse, checked.

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
        operations = tuple(_KINDS[entry["kind"]](**entry) for entry in data.pop("operations"))
        known = {entry.name for entry in fields(Program)}
        kept = {name: value for name, value in data.items() if name in known}
        kept["patch"], kept["local"] = tuple(kept["patch"]), tuple(kept["local"])
        return Program(operations=operations, **kept)
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"{where}: no program of a sparse model ({error})") from error
