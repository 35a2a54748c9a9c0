"""What quantisation is asked for: typed and free of torch, so that the CLI answers at once."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from trainers.config.base import Images, Settings

Mode = Literal["dynamic", "static", "qat"]
IMAGES = 512


class Calibration(Settings):
    """Which images the ranges of activations are taken from: a fixed part of the training split."""

    images: Images | None = Field(
        None, description=f"of the training split; the seed says which. Default: {IMAGES} at most"
    )


def check_training(training: Any, prefix: str) -> None:
    """Whether quantisation-aware training can be done so; takes a
    :class:`trainers.config.training.TrainingSettings`.

    Raises:
        ValueError: a means of training that fake quantisation does not know.
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
