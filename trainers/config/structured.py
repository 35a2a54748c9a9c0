"""Settings of structured pruning: the widths of the smaller model, and how its channels are chosen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from pydantic import Field, ValidationInfo, field_validator, model_validator

from trainers.config.base import Count, Images, Settings, Share
from trainers.config.latency import LatencyTarget
from trainers.config.training import TrainingSettings

Importance = Literal["magnitude", "taylor", "fisher"]
Width = int | float
"""An int is the number of channels or heads that stay, a float the share that stays."""


class Widths(Settings):
    """Widths of a smaller model.

    Fractions (0.75) are the share that stays, whole numbers the number that stays. A list has an entry for
    each stage of a Swin.
    """

    mlp: Width | tuple[Width, ...] = Field(1.0, description="hidden channels of each MLP")
    embed: Width = Field(1.0, description="channels between blocks (embed_dim); a Swin's of its first stage")
    heads: Width | tuple[Width, ...] = Field(1.0, description="attention heads; a ViT's go with embed")
    head_dim: Width | tuple[Width, ...] = Field(
        1.0, description="channels of each head; a ViT's are embed / heads"
    )

    @field_validator("mlp", "embed", "heads", "head_dim", mode="before")
    @classmethod
    def _widths(cls, value: Any, info: ValidationInfo) -> Any:
        if isinstance(value, list | tuple) and info.field_name != "embed":
            if not value:
                raise ValueError("must not be empty")
            return tuple(_width(width, info.field_name) for width in value)
        return _width(value, info.field_name)

    @property
    def cuts(self) -> bool:
        """Return whether any width is less than the whole."""
        return any(is_reduced(width) for width in (self.mlp, self.embed, self.heads, self.head_dim))


class StructuredSettings(Widths):
    """Whole channels are cut before weights are pruned; the result is a plain timm model of smaller width.

    With ``objective: latency`` all ``candidates`` are cut and evaluated without training; the fastest one
    that loses at most ``loss`` of the dense model's top-1 is taken, and trained to recover.
    """

    importance: Importance = Field(
        "taylor",
        description="what a channel is worth: Σ w², Σ |w·g|, or Σ w²·g² (the diagonal of the Fisher)",
    )
    images: Images = Field(2048, description="training images for the gradients of taylor and fisher")
    batch_size: Count = Field(32, description="images of a gradient")
    recovery: TrainingSettings | None = Field(
        TrainingSettings(), description="training of the smaller model before weights are pruned; null: none"
    )
    objective: Literal["widths", "latency"] = Field(
        "widths", description="widths: those given; latency: the fastest of candidates, by measured times"
    )
    candidates: tuple[Widths, ...] = Field((), description="of latency: mlp, embed, heads, head_dim of each")
    loss: Share | None = Field(
        None, description="of latency: how much of the dense model's top-1 may be lost before recovery"
    )
    target: LatencyTarget | None = Field(None, description="of latency: what is to be fast; default csr")

    @model_validator(mode="after")
    def _cuts_something(self) -> StructuredSettings:
        if self.objective == "latency":
            self._check_candidates()
            return self
        for key in _OF_LATENCY:
            if getattr(self, key) not in (None, ()):
                raise ValueError(f"{key}: is for objective: latency alone")
        if not self.cuts:
            raise ValueError("nothing would be cut: give a share below 1 of mlp, embed, heads or head_dim")
        return self

    def _check_candidates(self) -> None:
        for key in Widths.model_fields:
            if is_reduced(getattr(self, key)):
                raise ValueError(f"{key}: with objective: latency widths belong in candidates")
        if not self.candidates:
            raise ValueError("candidates: needed, as [{mlp: 0.75}, {mlp: 0.5}]: widths to choose from")
        if self.loss is None:
            raise ValueError("loss: needed: how much of the dense model's top-1 may be lost before recovery")
        for number, candidate in enumerate(self.candidates):
            if not candidate.cuts:
                raise ValueError(f"candidates.{number}: nothing would be cut")

    @property
    def serves(self) -> LatencyTarget:
        """The engine on which candidates are timed (``objective: latency``)."""
        return self.target or LatencyTarget()

    def choices(self) -> tuple[StructuredSettings, ...]:
        """Settings of each model that may be cut, with its widths in place of the candidates."""
        if self.objective == "widths":
            return (self,)
        rest = {"objective": "widths", "candidates": (), "loss": None, "target": None}
        return tuple(self.model_copy(update={**rest, **dict(widths)}) for widths in self.candidates)

    def decides(self) -> dict[str, Any]:
        """The settings that decide the result, for its hash."""
        rest = {"objective", *_OF_LATENCY} if self.objective == "widths" else set()
        return self.model_dump(mode="json", exclude=rest)


_OF_LATENCY = ("candidates", "loss", "target")


def is_reduced(value: Width | tuple[Width, ...]) -> bool:
    """Return whether a width is less than the whole."""
    if isinstance(value, tuple):
        return any(is_reduced(width) for width in value)
    return isinstance(value, int) or value < 1.0


def format_cut(cut: Mapping[str, Sequence[Any]]) -> str:
    """Format what was cut (kind -> [before, after]), as ``mlp 768 → 576, heads 2/4/8 → 1/2/4``."""
    return ", ".join(f"{kind} {' → '.join(map(_format_width, ends))}" for kind, ends in cut.items())


def _format_width(value: Any) -> str:
    return "/".join(map(str, value)) if isinstance(value, list) else str(value)


def _width(value: Any, key: str | None) -> Width:
    """Check one width.

    Raises:
        ValueError: neither a share nor a number.
    """
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if number and value == 1 and key != "heads":
        return 1.0  # 'mlp: 1' means the whole, and not an MLP of one channel
    if number and ((isinstance(value, float) and 0 < value <= 1) or (isinstance(value, int) and value >= 1)):
        return float(value) if isinstance(value, float) else int(value)
    if key == "embed" and isinstance(value, list | tuple | dict):
        raise ValueError("must be one number: timm holds one width, which doubles with each stage of a Swin")
    raise ValueError(
        "must be a share that stays (above 0, at most 1), a whole number that does, or a list with one of "
        "these for each stage"
    )
