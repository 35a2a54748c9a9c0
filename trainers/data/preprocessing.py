"""The description of preprocessing in exported files, and synthetic images that need no data set.

An exported file holds the description as JSON, under the name :data:`PREPROCESSING`: ``input_size``
(channels, height, width), ``mean`` and ``std`` (of pixels in 0…1), ``interpolation``, ``crop_pct`` and
``crop_mode`` (as timm defines them), ``classes`` (their number), and ``labels``, their names, if known.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

PREPROCESSING = "preprocessing"
PROBES = 4
"""Number of synthetic images whose logits a record keeps, so that anybody can check a file later."""
Images = NDArray[np.float32]
_KEPT = ("input_size", "mean", "std", "interpolation", "crop_pct", "crop_mode")


def preprocessing_of(model: Any, labels: Sequence[str] | None = None) -> dict[str, Any]:
    """Describe the preprocessing and the classes of a timm model.

    Args:
        model: the model.
        labels: names of the classes, in their order; default: those of timm's configuration, if it has any.
    """
    from trainers.models import factory

    config = factory.data_config(model)
    values = {key: config[key] for key in _KEPT}
    preprocessing = {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}
    names = labels or factory.label_names(model)
    return preprocessing | {"classes": factory.classes(model)} | ({"labels": list(names)} if names else {})


def metadata_of(preprocessing: Mapping[str, Any]) -> dict[str, str]:
    """The entry of an exported file's metadata that describes the preprocessing."""
    return {PREPROCESSING: json.dumps(preprocessing, sort_keys=True)}


def transform_settings(preprocessing: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of timm's ``create_transform`` for this preprocessing."""
    tuples = ("input_size", "mean", "std")
    return {key: tuple(preprocessing[key]) if key in tuples else preprocessing[key] for key in _KEPT}


def pattern_images(preprocessing: Mapping[str, Any], count: int) -> Images:
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
    mean, std = (np.reshape(preprocessing[key], (1, -1, 1, 1)) for key in ("mean", "std"))
    return np.ascontiguousarray((pixels - mean) / std, dtype=np.float32)
