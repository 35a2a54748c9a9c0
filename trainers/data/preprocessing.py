"""The description of preprocessing in exported files, and synthetic images that need no data set."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, NotRequired, TypedDict

import numpy as np
from numpy.typing import NDArray

PREPROCESSING = "preprocessing"
PROBES = 4
"""Number of synthetic images whose logits a record keeps, so that anybody can check a file later."""
Images = NDArray[np.float32]


class Preprocessing(TypedDict):
    """How a model's images are prepared, and its classes; exported files hold it as JSON.

    Attributes:
        input_size: channels, height, width.
        mean: of pixels in 0…1, by channel; ``std`` likewise.
        interpolation: as timm defines it, like ``crop_pct`` and ``crop_mode``.
        classes: their number.
        labels: their names, if known.
    """

    input_size: Sequence[int]
    mean: Sequence[float]
    std: Sequence[float]
    interpolation: str
    crop_pct: float
    crop_mode: str
    classes: int
    labels: NotRequired[list[str]]


def preprocessing_of(model: Any, labels: Sequence[str] | None = None) -> Preprocessing:
    """Describe the preprocessing and the classes of a timm model.

    Args:
        model: the model.
        labels: names of the classes, in their order; default: those of timm's configuration, if it has any.
    """
    from trainers.models import factory

    config = factory.data_config(model)
    preprocessing: Preprocessing = {
        "input_size": list(config["input_size"]),
        "mean": list(config["mean"]),
        "std": list(config["std"]),
        "interpolation": config["interpolation"],
        "crop_pct": config["crop_pct"],
        "crop_mode": config["crop_mode"],
        "classes": factory.classes(model),
    }
    names = labels or factory.label_names(model)
    if names:
        preprocessing["labels"] = list(names)
    return preprocessing


def metadata_of(preprocessing: Preprocessing) -> dict[str, str]:
    """The entry of an exported file's metadata that describes the preprocessing."""
    return {PREPROCESSING: json.dumps(preprocessing, sort_keys=True)}


def transform_settings(preprocessing: Preprocessing) -> dict[str, Any]:
    """The arguments of timm's ``create_transform`` for this preprocessing."""
    return {
        "input_size": tuple(preprocessing["input_size"]),
        "mean": tuple(preprocessing["mean"]),
        "std": tuple(preprocessing["std"]),
        "interpolation": preprocessing["interpolation"],
        "crop_pct": preprocessing["crop_pct"],
        "crop_mode": preprocessing["crop_mode"],
    }


def pattern_images(preprocessing: Preprocessing, count: int) -> Images:
    """Synthetic images of waves and squares, with the same bits on every machine, as a model's input.

    They serve to compare the answers of one model on two engines, and nothing else.

    Args:
        preprocessing: as :func:`preprocessing_of` describes it.
        count: number of images.

    Returns:
        (count, channels, height, width), float32, normalised.
    """
    channels, height, width = preprocessing["input_size"]
    number = np.arange(count).reshape(-1, 1, 1, 1)
    channel = np.arange(channels).reshape(1, -1, 1, 1)
    row = np.arange(height).reshape(1, 1, -1, 1) / height
    column = np.arange(width).reshape(1, 1, 1, -1) / width
    along = row * (1 + number % 5) + column * (1 + number % 7)
    wave = np.sin(2 * np.pi * along + channel + number)
    shade = 0.5 + 0.3 * wave * np.cos(number)
    square = (np.floor(4 * row + number) + np.floor(4 * column)) % 2  # edges, as photographs have them
    pixels = np.round(255 * np.clip(shade + 0.2 * square - 0.1, 0, 1)) / 255
    mean = np.reshape(preprocessing["mean"], (1, -1, 1, 1))
    std = np.reshape(preprocessing["std"], (1, -1, 1, 1))
    return np.ascontiguousarray((pixels - mean) / std, dtype=np.float32)
