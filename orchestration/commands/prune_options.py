"""What ``espalier prune`` is asked for, checked without torch so that a mistake is answered at once."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import PurePath
from typing import Any, get_args

from pydantic import ByteSize, TypeAdapter, ValidationError

from pruners.errors import InputError, did_you_mean
from pruners.methods.registry import METHODS, SECOND_ORDER
from pruners.model.sparsity_pattern import Pattern
from trainers.config.pruning import FisherSettings, ScopeName
from trainers.sources.columns import ColumnOptions

# what says how gradients are taken: nothing to a method that takes none
_OF_GRADIENTS = ("gradients", "per_sample", "block_size", "damp", "relative", "memory")


@dataclass(frozen=True)
class PruneOptions(ColumnOptions):
    """The options as they were typed; ``None`` is the default of the method."""

    model: str
    out: str
    method: str = "ovit"
    sparsity: float | None = None
    pattern: str = "unstructured"
    unfit: str = "refuse"
    scope: str | None = None
    floor: float = 0.0
    ceiling: float = 1.0
    layers: tuple[str, ...] = ()
    data: str | None = None
    test: str | None = None
    gradients: int | None = None
    batch_size: int = 128
    per_sample: bool = False
    block_size: int | None = None
    damp: str | None = None
    relative: bool | None = None
    memory: str | None = None
    seed: int = 0
    device: str | None = None

    def check(self) -> None:
        """Raises:
        InputError: the first thing that cannot work, by its option and value.
        """
        one_of("--method", self.method, sorted(METHODS))
        one_of("--unfit", self.unfit, ("refuse", "dense"))
        if self.scope is not None:
            one_of("--scope", self.scope, get_args(ScopeName))
        if self.device is not None:
            one_of("--device", self.device, ("cpu", "cuda"))
        layer_patterns(self.layers)
        self._check_sparsity()
        if self.method not in SECOND_ORDER:
            self._refuse_gradients()
            return
        if self.data is None:
            wanted = f"{self.method} follows gradients: give training images (Parquet: image, label)"
            raise InputError("--data", None, wanted)
        if self.relative is not None and self._damp() in (None, "auto"):
            flag = "--relative" if self.relative else "--absolute"
            raise InputError(flag, None, "says how a --damp is meant, and needs one that is a number")
        self._memory()

    @property
    def target(self) -> float:
        """The sparsity: the one given, or what an N:M pattern leads to."""
        forced = _pattern(self.pattern).forced
        sparsity = forced if self.sparsity is None else self.sparsity
        if sparsity is None:
            raise InputError(
                "--sparsity", None, "must be given, as 0.75 (N:M patterns alone bring their own)"
            )
        return sparsity

    def for_method(self) -> dict[str, Any]:
        """Constructor arguments of the method, and ``damp="auto"``."""
        found: dict[str, Any] = {"pattern": self.pattern}
        if self.method not in SECOND_ORDER:
            return found
        found |= {"gradients": self.gradients, "block_size": self.block_size, "damp": self._damp()}
        found["relative"] = self.relative
        if isinstance(found["damp"], float) and self.relative is None:
            found["relative"] = False  # a λ that is given is meant as it stands
        return {key: value for key, value in found.items() if value is not None}

    @property
    def fisher(self) -> FisherSettings:
        """Where the gradients come from."""
        return FisherSettings(
            gradients=self.gradients,
            batch_size=self.batch_size,
            per_sample=self.per_sample,
            memory=self._memory(),
        )

    @property
    def tries_damps(self) -> bool:
        return self.damp == "auto"

    def as_record(self) -> dict[str, Any]:
        """What of it ``pruning.json`` keeps."""
        elsewhere = ("model", "method", "seed", "out", "device")
        kept = {key: value for key, value in asdict(self).items() if key not in elsewhere}
        if self.data is not None:
            kept["data"] = PurePath(self.data).name  # where it lies on this machine helps nobody else
        return kept | {"sparsity": self.target, "layers": layer_patterns(self.layers)}

    def _check_sparsity(self) -> None:
        for key in ("floor", "ceiling"):
            _check_share(f"--{key}", getattr(self, key))
        if self.floor > self.ceiling:
            raise InputError("--floor", self.floor, f"must not lie above --ceiling {self.ceiling:g}")
        _check_share("--sparsity", self.target)
        nearest = min(max(self.target, self.floor), self.ceiling)
        if nearest != self.target:
            limits = f"--floor {self.floor:g} and --ceiling {self.ceiling:g}"
            wanted = f"cannot be met with {limits}; nearest feasible: {nearest:g}"
            raise InputError("--sparsity", self.target, wanted)

    def _refuse_gradients(self) -> None:
        for key in _OF_GRADIENTS:
            value = getattr(self, key)
            if value not in (None, False):
                others = ", ".join(sorted(SECOND_ORDER))
                wanted = f"{self.method} takes no gradients; drop it, or take a method that does ({others})"
                raise InputError(f"--{key.replace('_', '-')}", value, wanted)

    def _damp(self) -> float | str | None:
        if self.damp is None or self.damp == "auto":
            return self.damp
        try:
            number = float(self.damp)
        except ValueError:
            number = math.nan
        if not 0 < number < math.inf:
            raise InputError("--damp", self.damp, "must be a positive number, or auto")
        return number

    def _memory(self) -> ByteSize | None:
        try:
            size: ByteSize | None = TypeAdapter(ByteSize | None).validate_python(self.memory)
        except ValidationError:
            size = ByteSize(0)
        if size is not None and size <= 0:
            raise InputError("--memory", self.memory, "must be a size, as 8GiB or 500MB")
        return size


def one_of(key: str, value: str, choices: Iterable[str]) -> None:
    """Raises:
    InputError: ``value`` is none of ``choices``.
    """
    known = list(choices)
    if value not in known:
        raise InputError(key, value, f"must be one of {', '.join(known)}{did_you_mean(value, known)}")


def layer_patterns(texts: Iterable[str]) -> dict[str, list[str]] | None:
    """``MODULE=REGEX`` texts as patterns by module; none: the model's family says what is prunable.

    Raises:
        InputError: a text of another form.
    """
    found: dict[str, list[str]] = {}
    for text in texts:
        module, _, expression = text.partition("=")
        if not module or not expression:
            raise InputError("--layers", text, r"must have the form MODULE=REGEX, as QKV=attn\.qkv")
        found.setdefault(module, []).append(expression)
    return found or None


def _pattern(text: str) -> Pattern:
    try:
        return Pattern.parse(text)
    except InputError as error:
        raise InputError("--pattern", text, error.expected) from None


def _check_share(key: str, value: float) -> None:
    if not 0.0 <= value <= 1.0:
        raise InputError(key, value, "must lie between 0 and 1")
