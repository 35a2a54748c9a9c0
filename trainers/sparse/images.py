"""Images as a model takes them, by Pillow and numpy alone: what timm's transform for evaluation does."""

from __future__ import annotations

from pathlib import Path
from typing import IO, TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from PIL.Image import Image

    from trainers.data.preprocessing import Preprocessing


def prepared(image: str | Path | IO[bytes] | Image, preprocessing: Preprocessing) -> NDArray[np.float32]:
    """An image, resized, cropped and normalised.

    Args:
        image: a file, or a Pillow image.
        preprocessing: as :mod:`trainers.data.preprocessing` describes it.

    Returns:
        (channels, height, width).

    Raises:
        OSError: a file that is missing, or no image.
    """
    from PIL import Image, ImageOps

    opened = image if isinstance(image, Image.Image) else Image.open(image)
    picture = ImageOps.exif_transpose(opened).convert("RGB")
    _, height, width = preprocessing["input_size"]
    size = _size(picture, width, height, preprocessing)
    picture = picture.resize(size, Image.Resampling[preprocessing["interpolation"].upper()])
    fill = tuple(round(255 * value) for value in preprocessing["mean"])
    whole = Image.new("RGB", (max(width, size[0]), max(height, size[1])), fill)
    whole.paste(picture, ((whole.width - size[0]) // 2, (whole.height - size[1]) // 2))
    left, top = round((whole.width - width) / 2), round((whole.height - height) / 2)
    pixels = np.asarray(whole.crop((left, top, left + width, top + height)), np.float32) / np.float32(255)
    mean, std = (np.asarray(preprocessing[key], np.float32) for key in ("mean", "std"))
    return np.ascontiguousarray(((pixels - mean) / std).transpose(2, 0, 1))


def _size(picture: Image, width: int, height: int, preprocessing: Preprocessing) -> tuple[int, int]:
    """Width and height to which an image is resized before it is cropped."""
    wide, high = (int(side / preprocessing["crop_pct"]) for side in (width, height))
    if preprocessing["crop_mode"] == "squash":  # each side to its own
        return wide, high
    if preprocessing["crop_mode"] == "border":  # the longer side, and a border
        ratio = max(picture.width / wide, picture.height / high)
    elif wide == high:  # the shorter side
        short = min(picture.size)
        return int(wide * picture.width / short), int(wide * picture.height / short)
    else:
        ratio = min(picture.width / wide, picture.height / high)
    return round(picture.width / ratio), round(picture.height / ratio)
