"""How a recipe writes the distribution of a searched value."""

from __future__ import annotations

import json
from typing import Annotated, Any

from pydantic import Field, model_validator

from trainers.config.base import Settings

Whole = Annotated[int, Field(ge=-(10**9), le=10**9)]


class Distribution(Settings):
    """Distribution of a searched value: exactly one of the four, and ``when`` it is searched at all."""

    uniform: tuple[float, float] | None = None
    log: tuple[float, float] | None = Field(None, description="log-uniform")
    integer: tuple[Whole, Whole] | None = Field(None, description="both ends included")
    choice: tuple[bool | int | float | str | list[Any] | dict[str, Any] | None, ...] | None = Field(
        None, min_length=1
    )
    when: dict[str, Any] = Field({}, description="other searched keys -> the value that each must have")

    @model_validator(mode="after")
    def _exactly_one(self) -> Distribution:
        given = [value for value in (self.uniform, self.log, self.integer, self.choice) if value is not None]
        if len(given) != 1:
            raise ValueError("give exactly one of uniform, log, integer, choice")
        for bounds in (self.uniform, self.log, self.integer):
            if bounds is not None and not bounds[0] <= bounds[1]:
                raise ValueError(f"the lower bound {bounds[0]} lies above the upper one {bounds[1]}")
        if self.log is not None and self.log[0] <= 0:
            raise ValueError("log needs positive bounds")
        for number, value in enumerate(self.choice or ()):
            if value in (self.choice or ())[:number]:  # false beside 0 too: Python takes them for equal
                raise ValueError(f"choice: {json.dumps(value)} stands there twice")
        return self

    @property
    def size(self) -> int:
        """How many values a choice or an integer can have; 0 for other distributions."""
        if self.integer is not None:
            return self.integer[1] - self.integer[0] + 1
        return len(self.choice or ())

    def values(self) -> tuple[Any, ...]:
        """All values of a choice or an integer."""
        if self.integer is not None:
            return tuple(range(self.integer[0], self.integer[1] + 1))
        return self.choice or ()
