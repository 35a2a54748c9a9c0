"""What the parts of a recipe are made of: typed, checked, free of torch so that the CLI answers at once."""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

# No run needs more than the upper limits below; they keep a slip of the keyboard (1e21 workers) from being
# expanded, or waited for.
Share = Annotated[float, Field(ge=0.0, le=1.0)]
Positive = Annotated[float, Field(gt=0.0, le=1e9)]
Rate = Annotated[float, Field(ge=0.0, le=1e3)]
"""A learning rate or a decay."""
Amount = Annotated[float, Field(ge=0.0, le=1e5)]
"""Of processors or accelerators."""
Count = Annotated[int, Field(ge=1, le=10**6)]
Images = Annotated[int, Field(ge=1, le=10**9)]
Steps = Annotated[int, Field(ge=1, le=10**5)]
"""What a schedule expands to: epochs, pruning steps."""
Workers = Annotated[int, Field(ge=1, le=10**5)]
Seed = Annotated[int, Field(ge=0, le=2**31 - 1)]
"""What the samplers (numpy's 32 bits) take too, with the number of known trials added."""

_LONGEST = 4096  # of a path
_LONGEST_NAME = 128  # of what becomes a file's name, with room for what is put around it
_LARGEST = 2**16
_DEEPEST = 1000
_NO_TEXT = frozenset({"Cc", "Cs"})  # control characters, halves of a character
T = TypeVar("T", bound=Hashable)


def _is_name(text: str) -> str:
    if not text.strip():
        raise ValueError("must not be empty")
    if any(unicodedata.category(letter) in _NO_TEXT for letter in text):
        raise ValueError("must be text without control characters")
    return text


def _is_expression(text: str) -> str:
    try:
        re.compile(text)
    except (re.error, OverflowError, RecursionError) as error:
        raise ValueError(f"{text!r} is no regular expression ({error})") from None
    return text


def _distinct(values: tuple[T, ...]) -> tuple[T, ...]:
    if len(set(values)) != len(values):
        raise ValueError("must not name one twice")
    return values


def _arguments(values: dict[str, Any]) -> dict[str, Any]:
    """Keyword arguments of outside software, which nothing else checks before it builds what they ask for.

    Raises:
        ValueError: a number that is not finite, or of which something would be made that no machine holds.
    """
    for key, value in values.items():
        deep = any(word in key for word in ("depth", "layers", "blocks"))
        for number in _numbers(value):
            if not math.isfinite(number):
                raise ValueError(f"{key}: must be finite ({number} given)")
            if abs(number) > (_DEEPEST if deep else _LARGEST):
                raise ValueError(f"{key}: must be at most {_DEEPEST if deep else _LARGEST} ({number} given)")
    return values


def _numbers(value: Any) -> list[float]:
    if isinstance(value, Mapping):
        return [number for one in value.values() for number in _numbers(one)]
    if isinstance(value, list | tuple):
        return [number for one in value for number in _numbers(one)]
    return [value] if isinstance(value, int | float) else []


Name = Annotated[str, Field(max_length=_LONGEST), AfterValidator(_is_name)]
ShortName = Annotated[str, Field(max_length=_LONGEST_NAME), AfterValidator(_is_name)]
Expression = Annotated[Name, AfterValidator(_is_expression)]
Distinct = AfterValidator(_distinct)
Arguments = Annotated[dict[str, Any], AfterValidator(_arguments)]


_WEIGHTS = (".pth", ".pt", ".tar", ".bin", ".ckpt", ".safetensors")


def is_weights_file(uri: str) -> bool:
    """Whether a checkpoint is a file of weights, as training scripts write it, and no folder."""
    try:
        return uri.lower().endswith(_WEIGHTS) and not Path(uri).expanduser().is_dir()
    except RuntimeError:  # ~nobody
        return True


class Settings(BaseModel):
    """Base of every part of a recipe: unknown keys are refused, values never change after they are read.

    Numbers are finite.
    """

    # built when first used, and then once for a whole recipe: most commands need few of these
    model_config = ConfigDict(
        extra="forbid", frozen=True, protected_namespaces=(), allow_inf_nan=False, defer_build=True
    )


def flatten(content: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dictionaries as ``a.b.c`` -> value."""
    flat: dict[str, Any] = {}
    for key, value in content.items():
        if isinstance(value, Mapping) and value:
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat
