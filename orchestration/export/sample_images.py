"""Real images that need no data set: parts of the two photographs in scikit-learn."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from PIL.Image import Image

NAME = "parts of scikit-learn's two photographs"
_LEAST = 64  # pixels of the smallest part's side


def photographs(count: int, seed: int = 0) -> list[Image]:
    """Square parts, large and small, of a Chinese temple and a flower; the same ones at each call."""
    from PIL import Image
    from sklearn.datasets import load_sample_images

    whole: list[np.ndarray[Any, Any]] = load_sample_images().images
    draw = np.random.default_rng(seed)
    parts = []
    for number in range(count):
        picture = whole[number % len(whole)]
        height, width, _ = picture.shape
        side = int(draw.integers(_LEAST, min(height, width) + 1))
        top, left = int(draw.integers(height - side + 1)), int(draw.integers(width - side + 1))
        parts.append(Image.fromarray(picture[top : top + side, left : left + side]))
    return parts


def as_input(count: int, transform: Callable[[Image], Any]) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Photographs as a model takes them: (count, channels, height, width), normalised."""
    return np.stack([np.asarray(transform(picture), np.float32) for picture in photographs(count)])
