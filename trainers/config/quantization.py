"""Settings of quantization; without torch, so that the command line starts fast."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from trainers.config.base import Images, Settings

if TYPE_CHECKING:
    from trainers.config.training import TrainingSettings

Mode = Literal["dynamic", "static", "qat"]
CALIBRATION_IMAGES = 512
"""Images for calibration where a recipe gives no number, or all of the training split if it has fewer."""


class Calibration(Settings):
    """The images from which the ranges of activations are taken: a fixed part of the training split."""

    images: Images | None = Field(
        None, description=f"of the training split; the seed says which. Default: {CALIBRATION_IMAGES} at most"
    )


def check_training(training: TrainingSettings, prefix: str) -> None:
    """Check that settings of training can be used for quantization-aware training.

    Args:
        training: the settings.
        prefix: put before the name of a key in the error message.

    Raises:
        ValueError: a setting that fake quantization does not support.
    """
    refused = {
        "ema": (training.ema, "an average of weights has no ranges of its own; leave it out"),
        "drop_path": (training.drop_path, "the model is traced as it is evaluated, without drop path"),
        "compile": (training.compile, "the traced model is not compiled; leave it out"),
        "channels_last": (training.channels_last, "the traced model has one layout; leave it out"),
    }
    for key, (value, why) in refused.items():
        if value:
            raise ValueError(f"{prefix}{key}: {why} ({value!r} given)")
    if training.precision != "float32":
        raise ValueError(
            f"{prefix}precision: fake quantisation computes in float32 ({training.precision!r} given)"
        )
