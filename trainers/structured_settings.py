"""What a recipe says of structured pruning: how wide the model is to be, and how its channels are chosen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from pydantic import Field, ValidationInfo, field_validator, model_validator

from trainers.config import TrainingSettings
from trainers.settings import Settings

Importance = Literal["magnitude", "taylor", "fisher"]
Width = int | float
"""A whole number is what stays, a fraction the share that does."""


class StructuredSettings(Settings):
    """Whole channels are cut before weights are pruned; what is left is a plain timm model, only smaller.

    Fractions (0.75) are the share that stays, whole numbers what stays of it. A list has an entry for each
    stage of a Swin.
    """

    mlp: Width | tuple[Width, ...] = Field(1.0, description="hidden channels of each MLP")
    embed: Width = Field(1.0, description="channels between blocks (embed_dim); a Swin's of its first stage")
    heads: Width | tuple[Width, ...] = Field(1.0, description="attention heads; a ViT's go with embed")
    head_dim: Width | tuple[Width, ...] = Field(
        1.0, description="channels of each head; a ViT's are embed / heads"
    )
    importance: Importance = Field(
        "taylor",
        description="what a channel is worth: Σ w², Σ |w·g|, or Σ w²·g² (the diagonal of the Fisher)",
    )
    images: int = Field(2048, ge=1, description="training images for the gradients of taylor and fisher")
    batch_size: int = Field(32, ge=1, description="images of a gradient")
    recovery: TrainingSettings | None = Field(
        TrainingSettings(), description="training of the smaller model before weights are pruned; null: none"
    )

    @field_validator("mlp", "embed", "heads", "head_dim", mode="before")
    @classmethod
    def _widths(cls, value: Any, info: ValidationInfo) -> Any:
        if isinstance(value, list | tuple) and info.field_name != "embed":
            if not value:
                raise ValueError("must not be empty")
            return tuple(_width(one, info.field_name) for one in value)
        return _width(value, info.field_name)

    @model_validator(mode="after")
    def _cuts_something(self) -> StructuredSettings:
        if not any(asked(one) for one in (self.mlp, self.embed, self.heads, self.head_dim)):
            raise ValueError("nothing would be cut: give a share below 1 of mlp, embed, heads or head_dim")
        return self


def asked(value: Width | tuple[Width, ...]) -> bool:
    """Whether a recipe asks for less than the whole."""
    if isinstance(value, tuple):
        return any(asked(one) for one in value)
    return isinstance(value, int) or value < 1.0


def words(cut: Mapping[str, Sequence[Any]]) -> str:
    """``mlp 768 → 576, heads 2/4/8 → 1/2/4`` for what was cut, kind -> [before, after]."""
    return ", ".join(
        f"{kind} {' → '.join('/'.join(map(str, one)) if isinstance(one, list) else str(one) for one in ends)}"
        for kind, ends in cut.items()
    )


def _width(value: Any, key: str | None) -> Width:
    """Raises:
    ValueError: neither a share nor a number.
    """
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if number and value == 1 and key != "heads":
        return 1.0  # 'mlp: 1' means the whole of it, and no MLP of one channel
    if number and ((isinstance(value, float) and 0 < value <= 1) or (isinstance(value, int) and value >= 1)):
        return float(value) if isinstance(value, float) else int(value)
    if key == "embed" and isinstance(value, list | tuple | dict):
        raise ValueError("must be one number: timm holds one width, which doubles with each stage of a Swin")
    raise ValueError(
        "must be a share that stays (above 0, at most 1), a whole number that does, or a list with one of "
        "these for each stage"
    )
