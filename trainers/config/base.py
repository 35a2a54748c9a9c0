"""Types that the settings of a recipe are made of; without torch, so that the command line starts fast."""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

# Upper limits that no run reaches: they refuse a typing error (1e21 workers) before anything expands it.
Share = Annotated[float, Field(ge=0.0, le=1.0)]
Positive = Annotated[float, Field(gt=0.0, le=1e9)]
Rate = Annotated[float, Field(ge=0.0, le=1e3)]
"""A learning rate, a weight decay or the strength of an augmentation."""
Amount = Annotated[float, Field(ge=0.0, le=1e5)]
"""A number of processors or accelerators, in parts too."""
Count = Annotated[int, Field(ge=1, le=10**6)]
Images = Annotated[int, Field(ge=1, le=10**9)]
ImagesToSolveOn = Annotated[int, Field(ge=0, le=10**6, exclude_if=lambda images: images == 0)]
"""Images of a reconstruction; 0, and left out of a recipe's record, where there is none."""
Steps = Annotated[int, Field(ge=1, le=10**5)]
"""A number of epochs or of pruning steps: schedules are expanded to as many entries."""
Workers = Annotated[int, Field(ge=1, le=10**5)]
Seed = Annotated[int, Field(ge=0, le=2**31 - 1)]
"""Small enough for the samplers, whose seed has 32 bits and to which the number of known trials is added."""

_LONGEST = 4096  # characters of a path
_LONGEST_NAME = 128  # characters of a name of which file names are made
_LARGEST = 2**16  # number among a model's arguments
_DEEPEST = 1000  # number of layers or blocks
_NO_TEXT = frozenset({"Cc", "Cs"})  # Unicode categories: control characters and surrogates
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
    """Check keyword arguments of other libraries, which do not check them before they allocate memory.

    Raises:
        ValueError: a number that is not finite, or too large for any machine.
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
        return [number for entry in value.values() for number in _numbers(entry)]
    if isinstance(value, list | tuple):
        return [number for entry in value for number in _numbers(entry)]
    return [value] if isinstance(value, int | float) else []


Name = Annotated[str, Field(max_length=_LONGEST), AfterValidator(_is_name)]
ShortName = Annotated[str, Field(max_length=_LONGEST_NAME), AfterValidator(_is_name)]
Expression = Annotated[Name, AfterValidator(_is_expression)]
Distinct = AfterValidator(_distinct)
Arguments = Annotated[dict[str, Any], AfterValidator(_arguments)]


_WEIGHTS = (".pth", ".pt", ".tar", ".bin", ".ckpt", ".safetensors")


def is_weights_file(uri: str) -> bool:
    """Return whether a checkpoint is a file of weights, as training scripts write it, and not a folder."""
    try:
        path = uri.partition("?")[0] if "://" in uri else uri  # after it, options of a file system
        return path.lower().endswith(_WEIGHTS) and not Path(uri).expanduser().is_dir()
    except RuntimeError:  # ~nobody
        return True


class Settings(BaseModel):
    """Base of every part of a recipe: unknown keys are refused, numbers are finite, values never change."""

    # validators are built at first use: most commands need few of them
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
