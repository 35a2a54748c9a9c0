"""The recipe's ``quantize``: how the pruned models of a sweep become INT8 ones."""

from __future__ import annotations

from typing import Any

from pydantic import Field, model_validator

from trainers.config.quantization import Calibration, Mode, check_training
from trainers.config.training import TrainingSettings

AWARE: dict[str, Any] = {"epochs": 10, "lr": {"kind": "linear", "peak": 1e-4, "floor": 1e-5}}
"""How training for INT8 goes where nothing else is said: the rate is that of the oViT paper's."""


class AwareTraining(TrainingSettings):
    """Settings that fake quantisation can be trained with."""

    @model_validator(mode="after")
    def _can_be(self) -> AwareTraining:
        check_training(self, "")
        return self


class Quantization(Calibration):
    """After the last gradual run of each method; ``static`` and ``qat`` take ranges from training images.

    ``dynamic`` measures activations as they come, ``static`` fixes their ranges once, ``qat`` trains the
    float model with fake quantisation before, its zeros held.
    """

    mode: Mode = "static"
    recovery: AwareTraining | None = Field(
        None, description="qat: how it is trained. Default: 10 epochs, from 1e-4 down to 1e-5"
    )

    @model_validator(mode="after")
    def _fits_the_mode(self) -> Quantization:
        if self.mode == "dynamic" and self.images is not None:
            raise ValueError("images: dynamic quantisation needs none; drop it")
        if self.recovery is not None and self.mode != "qat":
            raise ValueError(f"recovery: only qat trains (mode is {self.mode})")
        return self

    @property
    def training(self) -> TrainingSettings | None:
        """Of ``qat``; nothing of the others."""
        if self.mode != "qat":
            return None
        return self.recovery or AwareTraining.model_validate(AWARE)

    @property
    def calibration(self) -> Calibration:
        return Calibration(images=self.images)
