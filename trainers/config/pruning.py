"""Settings of pruning: the method, the allocation of sparsity to layers, the pattern, the Fisher."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BeforeValidator, ByteSize, Field, model_validator

from pruners.errors import InputError
from pruners.methods.registry import METHODS, SECOND_ORDER
from pruners.model.sparsity_pattern import Pattern
from pruners.rounds import remaining_rounds, round_sparsities
from trainers.config.base import (
    Count,
    Distinct,
    Expression,
    ImagesToSolveOn,
    Name,
    Settings,
    Share,
)
from trainers.config.schedules import PruningSchedule

PerLayer = Share | dict[str, Share]


if TYPE_CHECKING:
    Method = str  # a type checker cannot read the names out of a table
else:
    Method = Literal[tuple(sorted(METHODS))]


ScopeName = Literal["layer", "module", "stage", "global"]


Patterns = Annotated[tuple[Expression, ...], Field(min_length=1)]


def _not_sexagesimal(value: object) -> object:
    """Undo YAML 1.1, which reads 2:4 without quotes as the number 124, of base 60."""
    return f"{value // 60}:{value % 60}" if isinstance(value, int) and value >= 60 else value


PatternName = Annotated[Name, BeforeValidator(_not_sexagesimal)]

_MOST_ROUNDS = 100


def _number_or_sparsities(value: object) -> object:
    """Check the form of rounds; to which sparsity they must lead is known where they are used."""
    if isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= _MOST_ROUNDS:
        return value
    if isinstance(value, list | tuple) and 1 <= len(value) <= _MOST_ROUNDS:
        numbers = [entry for entry in value if isinstance(entry, int | float) and 0 < entry <= 1]
        if len(numbers) == len(value) and numbers == sorted(set(numbers)):
            return value
    raise ValueError(
        f"must be a number of rounds from 1 to {_MOST_ROUNDS}, or ascending sparsities as [0.75, 0.9, 0.95]"
    )


Rounds = Annotated[int | tuple[float, ...], BeforeValidator(_number_or_sparsities)]
"""How many rounds, each of which prunes the same share of what is left; or the sparsity of each."""


class FisherSettings(Settings):
    """The empirical Fisher of second-order methods: m gradients, blocks of B weights, damping λ.

    Values that are not given are the method's defaults (``ovit``: m = 4096 and λ = 1e-8; ``ovit_fast``:
    m = 256 and λ = 1e-2 of the mean of the diagonal).
    """

    gradients: Count | None = Field(None, description="m, over all workers")
    batch_size: Count = Field(128, description="images of a gradient")
    per_sample: bool = Field(False, description="a gradient of each image instead of each batch")
    block_size: Count | dict[str, Count] = Field(192, description="B, for all layers or for each module")
    damp: Annotated[float, Field(gt=0.0, le=1e9)] | Literal["auto"] | None = Field(
        None, description="λ; auto tries 1e-4 … 1e-9 on held-out training images before each pruning step"
    )
    relative: bool | None = Field(None, description="λ is a share of the mean of each layer's diagonal")
    double: bool = Field(False, description="sums in float64")
    memory: ByteSize | None = Field(
        None, description="for the Fisher of a worker, as 8GiB; default 60 % of what is free"
    )
    rounds: Rounds = Field(
        1,
        # results of earlier versions keep their names
        exclude_if=lambda rounds: rounds == 1,
        description="how many, or the sparsities that they lead to: m is divided among them, and each "
        "takes its gradients at the weights that the one before left",
    )


_SHORTENS = 0.5  # a floor from which a stored order is made for it


class PruningSettings(Settings):
    """Which weights are pruned, by which method, and to which sparsity."""

    methods: Annotated[tuple[Method, ...], Distinct] = Field(
        ("dimap", "ovit"), min_length=1, description="each gives a pruned model of its own"
    )
    sparsity: Share = Field(
        0.75, description="zeros / prunable weights at the end, 0 to 1; met to one weight"
    )
    layers: dict[Name, Patterns] | None = Field(
        None, min_length=1, description="module -> regular expressions"
    )
    pattern: PatternName = Field("unstructured", description="unstructured, N:M as 2:4 or 4:8, or 1x4")
    unfit: Literal["refuse", "dense"] = Field("refuse", description="layers that the pattern cannot fit")
    scope: ScopeName | None = Field(None, description="what shares one threshold; default the method's own")
    table: dict[Expression, Share] | None = Field(
        None, min_length=1, description="layer-name pattern -> sparsity, instead of thresholds"
    )
    floor: PerLayer = Field(0.0, description="least sparsity of a layer, or of those that a pattern matches")
    ceiling: PerLayer = Field(1.0, description="largest sparsity of a layer, or by patterns")
    schedule: PruningSchedule = PruningSchedule()
    keep: Annotated[tuple[Share, ...], Distinct] = Field(
        (), description="sparsities on the way whose best model is kept too"
    )
    fisher: FisherSettings = FisherSettings()
    reconstruct: ImagesToSolveOn = Field(
        0,
        description="training images on which the weights that are kept are solved again after each pruning "
        "step, so that layers give the outputs that they gave before; 0: they are not",
    )

    @property
    def order_begins_at(self) -> float:
        """The sparsity of every layer below which a stored order holds no weights.

        A low or layered floor shortens little, and an order without it serves recipes of any floor.
        """
        return self.floor if isinstance(self.floor, float) and self.floor >= _SHORTENS else 0.0

    @model_validator(mode="after")
    def _floor_below_ceiling(self) -> PruningSettings:
        self.check_reach(self.sparsity, "sparsity")
        self.schedule.check(self.sparsity)
        if self.table is not None and self.scope is not None:
            raise ValueError("table: says what each layer gives up; drop scope")
        return self

    @model_validator(mode="after")
    def _rounds_lead_to_the_sparsity(self) -> PruningSettings:
        try:
            round_sparsities(self.fisher.rounds, 0.0, self.sparsity)
        except InputError as error:
            raise ValueError(f"fisher.rounds: {error.expected}") from None
        return self

    def check_reach(self, sparsity: float, key: str) -> None:
        """Check that a sparsity can be reached.

        Args:
            sparsity: share of zeros, 0…1.
            key: the recipe key that asks for it, for the error message.

        Raises:
            ValueError: a sparsity that floor, ceiling or the pattern do not allow.
        """
        floor = self.floor if isinstance(self.floor, float) else 0.0
        ceiling = self.ceiling if isinstance(self.ceiling, float) else 1.0
        if not floor <= sparsity <= ceiling:
            raise ValueError(
                f"{key}: cannot be met with floor {floor} and ceiling {ceiling}; "
                f"nearest feasible: {min(max(sparsity, floor), ceiling)}"
            )
        forced = forced_sparsity(self.pattern)
        if forced is not None and abs(sparsity - forced) > 1e-9:
            raise ValueError(f"{key}: {self.pattern} leads to {forced:g}, no other ({sparsity} given)")

    def options(self, method: str) -> dict[str, Any]:
        """Constructor arguments of a method; without ``damp: auto``, which the pruning step handles."""
        arguments: dict[str, Any] = {"pattern": self.pattern}
        if method in SECOND_ORDER:
            fisher = self.fisher
            arguments |= {"block_size": fisher.block_size, "double": fisher.double}
            arguments |= {
                key: value
                for key in ("gradients", "damp", "relative")
                if (value := getattr(fisher, key)) not in (None, "auto")
            }
            if isinstance(fisher.damp, float) and fisher.relative is None:
                arguments["relative"] = False  # a λ that is given is an absolute value
        return arguments

    def of_round(self, sparsity: float, gradients: int, rounds: int) -> PruningSettings:
        """The settings of one of several rounds, which is a pruning of its own.

        Args:
            sparsity: that the round leads to.
            gradients: of all rounds together.
            rounds: how many there are.
        """
        share = {"gradients": max(gradients // rounds, 1), "rounds": 1}
        return self.model_copy(update={"sparsity": sparsity, "fisher": self.fisher.model_copy(update=share)})

    def rounds(self, method: str, start: float, end: float) -> list[float]:
        """The sparsity of each round in which a method prunes.

        Args:
            method: one that follows no gradients has no rounds.
            start: sparsity of the model before, 0…1.
            end: the sparsity that this pruning step leads to, 0…1.

        Returns:
            Ascending sparsities; the last one is ``end``.
        """
        return remaining_rounds(self.fisher.rounds if method in SECOND_ORDER else 1, start, end)

    def tries_damps(self, method: str) -> bool:
        """Return whether a pruning step by this method tries several λ (``damp: auto``)."""
        return method in SECOND_ORDER and self.fisher.damp == "auto"


def forced_sparsity(pattern: str) -> float | None:
    """The sparsity that an N:M pattern has, 1 - N/M; ``None`` for a pattern that leaves it free.

    Raises:
        ValueError: an unknown pattern.
    """
    try:
        return Pattern.parse(pattern).forced
    except InputError as error:
        raise ValueError(f"pattern: {error.expected} ({pattern!r} given)") from None
