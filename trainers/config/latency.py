"""Settings of latency: the engine on which a model is to be fast."""

from __future__ import annotations

from pydantic import Field, model_validator

from pruners.errors import InputError, did_you_mean
from trainers.config.base import Count, Positive, Settings
from trainers.config.engines import Choice

MEASURED = ("csr", "sparse", "torch", "onnxruntime", "openvino")
"""Engines that run a single layer in the same way as inside a model; first those that zeros make faster."""


class LatencyTarget(Settings):
    """The engine that will serve a model, and how: times are measured so, once for each machine and model."""

    engine: str = Field("csr", description=", ".join(MEASURED))
    type: str | None = Field(None, description="float32 or bfloat16; default the engine's own")
    batch: Count = Field(1, description="images at once")
    threads: Count = Field(1, description="of the processor, that the engine uses")
    resources: dict[str, Positive] = Field(
        {}, description="Ray resources that the node has which is to serve: it is measured there"
    )

    @model_validator(mode="after")
    def _can_be_measured(self) -> LatencyTarget:
        if self.engine not in MEASURED:
            others = f"must be one of {', '.join(MEASURED)}{did_you_mean(self.engine, MEASURED)}"
            raise ValueError(f"engine: {others}; on no other can layers be timed alone")
        if (self.type or "").startswith("int8"):
            raise ValueError("type: INT8 is made of a model that was chosen; measure float32 or bfloat16")
        try:
            _ = self.choice
        except InputError as error:
            raise ValueError(f"type: {error.expected}") from None
        return self

    @property
    def choice(self) -> Choice:
        """The engine in its data type."""
        return Choice.parse(self.engine if self.type is None else f"{self.engine}:{self.type}")

    def __str__(self) -> str:
        return f"{self.choice} (batch {self.batch}, threads {self.threads})"
