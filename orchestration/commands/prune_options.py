"""Options of ``espalier prune``, checked without torch so that a mistake is answered at once."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import PurePath
from typing import Any, get_args

from pydantic import ByteSize, TypeAdapter, ValidationError

from orchestration.common import defaults
from pruners.errors import InputError, check_share, did_you_mean
from pruners.methods.registry import METHODS, SECOND_ORDER
from pruners.model.sparsity_pattern import Pattern
from pruners.rounds import round_sparsities
from trainers.config.pruning import FisherSettings, ScopeName
from trainers.sources.columns import ColumnOptions

# options of gradients: refused for a method that takes none
_OF_GRADIENTS = ("gradients", "per_sample", "block_size", "damp", "relative", "memory")


@dataclass(frozen=True)
class PruneOptions(ColumnOptions):
    """The options as they were typed; ``None`` is the default of the method."""

    model: str
    out: str
    method: str = defaults.METHOD
    sparsity: float | None = None
    pattern: str = defaults.PATTERN
    unfit: str = defaults.UNFIT
    scope: str | None = None
    floor: float = defaults.FLOOR
    ceiling: float = defaults.CEILING
    layers: tuple[str, ...] = ()
    data: str | None = None
    test: str | None = None
    gradients: int | None = None
    batch_size: int = defaults.BATCH_SIZE
    per_sample: bool = False
    block_size: int | None = None
    damp: str | None = None
    relative: bool | None = None
    memory: str | None = None
    rounds: str | None = None
    reconstruct: int | None = None
    seed: int = defaults.SEED
    device: str | None = None

    def check(self) -> None:
        """Check the options together.

        Raises:
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
        self.in_rounds  # noqa: B018  # raises if the text is wrong
        if self.method not in SECOND_ORDER:
            self._refuse_gradients()
            self._check_reconstruct()
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
        """The sparsity: the given one, or that of an N:M pattern.

        Raises:
            InputError: neither is given, or the pattern is unknown.
        """
        forced = _pattern(self.pattern).forced
        sparsity = forced if self.sparsity is None else self.sparsity
        if sparsity is None:
            raise InputError(
                "--sparsity", None, "must be given, as 0.75 (N:M patterns alone bring their own)"
            )
        return sparsity

    @property
    def in_rounds(self) -> int | list[float]:
        """The number of rounds, or the sparsities that they lead to.

        Raises:
            InputError: ``--rounds`` is neither.
        """
        if self.rounds is None:
            return 1
        try:
            number = int(self.rounds)
        except ValueError:
            return self._sparsities(self.rounds)
        if number < 1:
            raise InputError("--rounds", self.rounds, "must be at least 1, or sparsities as 0.75,0.9,0.95")
        return number

    def _sparsities(self, text: str) -> list[float]:
        expected = f"must be a number, or ascending sparsities of which the last is {self.target:g}"
        try:
            given = [float(part) for part in text.split(",")]
        except ValueError:
            given = []
        with InputError.renamed(lambda error: InputError("--rounds", text, expected)):
            return round_sparsities(given, 0.0, self.target)

    def for_method(self) -> dict[str, Any]:
        """Constructor arguments of the method, and ``damp="auto"``."""
        arguments: dict[str, Any] = {"pattern": self.pattern}
        if self.method not in SECOND_ORDER:
            return arguments
        arguments |= {"gradients": self.gradients, "block_size": self.block_size, "damp": self._damp()}
        arguments["relative"] = self.relative
        if isinstance(arguments["damp"], float) and self.relative is None:
            arguments["relative"] = False  # a given λ is absolute
        return {key: value for key, value in arguments.items() if value is not None}

    @property
    def fisher(self) -> FisherSettings:
        """Settings of the gradients and of the Fisher."""
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
        """The options as ``pruning.json`` keeps them."""
        elsewhere = ("model", "method", "seed", "out", "device")
        kept = {key: value for key, value in asdict(self).items() if key not in elsewhere}
        if self.data is not None:
            kept["data"] = PurePath(self.data).name  # the path on this machine is of no use to others
        return kept | {"sparsity": self.target, "layers": layer_patterns(self.layers)}

    def _check_sparsity(self) -> None:
        for key in ("floor", "ceiling"):
            check_share(f"--{key}", getattr(self, key))
        if self.floor > self.ceiling:
            raise InputError("--floor", self.floor, f"must not lie above --ceiling {self.ceiling:g}")
        check_share("--sparsity", self.target)
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

    def _check_reconstruct(self) -> None:
        """Methods without gradients: reconstruction needs images, and rounds need reconstruction."""
        if self.reconstruct is not None and self.data is None:
            wanted = "solves weights on images: give training images (Parquet: image)"
            raise InputError("--reconstruct", self.reconstruct, wanted + " by --data")
        if self.reconstruct is None and self.in_rounds != 1:
            wanted = f"change nothing where {self.method} looks at weights alone; add --reconstruct"
            raise InputError("--rounds", self.rounds, wanted)

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
    """Check that a value is one of some choices.

    Args:
        key: names it in the error.
        value: the value.
        choices: what it may be.

    Raises:
        InputError: it is none of them.
    """
    known = list(choices)
    if value not in known:
        raise InputError(key, value, f"must be one of {', '.join(known)}{did_you_mean(value, known)}")


def layer_patterns(texts: Iterable[str]) -> dict[str, list[str]] | None:
    """Read ``MODULE=REGEX`` texts as lists of patterns by module.

    Returns:
        The patterns; ``None`` without any text: the model's family then says what is prunable.

    Raises:
        InputError: a text of another form.
    """
    patterns: dict[str, list[str]] = {}
    for text in texts:
        module, _, expression = text.partition("=")
        if not module or not expression:
            raise InputError("--layers", text, r"must have the form MODULE=REGEX, as QKV=attn\.qkv")
        patterns.setdefault(module, []).append(expression)
    return patterns or None


def _pattern(text: str) -> Pattern:
    with InputError.renamed(lambda error: InputError("--pattern", text, error.expected)):
        return Pattern.parse(text)
