"""Pictures of every kind that files of images hold, and tables of them."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa
from image_tables import IMAGES
from PIL import Image

GRADIENT = np.linspace(0, 255, 64 * 48).reshape(48, 64)


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    sink = io.BytesIO()
    image.save(sink, kind, **options)
    return sink.getvalue()


def grey16() -> bytes:
    return encoded(Image.fromarray((GRADIENT * 257).astype(np.uint16)), "PNG")


GREY = Image.fromarray(GRADIENT.astype(np.uint8))


def rotated() -> bytes:
    """A camera that was held upright: 64×48 pixels that are to be shown as 48×64."""
    exif = Image.Exif()
    exif[0x0112] = 6
    return encoded(Image.fromarray(GRADIENT.astype(np.uint8)).convert("RGB"), "JPEG", exif=exif, quality=95)


def animated() -> bytes:
    frames = [Image.new("RGB", (20, 10), (shade, 0, 0)) for shade in (200, 100, 50)]
    return encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])


PICTURES: dict[str, tuple[Callable[[], bytes], tuple[int, int]]] = {
    "grey": (lambda: encoded(GREY, "JPEG"), (64, 48)),
    "grey with alpha": (lambda: encoded(GREY.convert("LA"), "PNG"), (64, 48)),
    "black and white": (lambda: encoded(GREY.convert("1"), "PNG"), (64, 48)),
    "16 bits": (grey16, (64, 48)),
    "32-bit integers": (lambda: encoded(GREY.convert("I"), "TIFF"), (64, 48)),
    "floats": (lambda: encoded(GREY.convert("F"), "TIFF"), (64, 48)),
    "alpha": (lambda: encoded(GREY.convert("RGBA"), "PNG"), (64, 48)),
    "palette": (lambda: encoded(GREY.convert("P"), "PNG"), (64, 48)),
    "palette with transparency": (
        lambda: encoded(GREY.convert("P"), "PNG", transparency=bytes(range(256))),
        (64, 48),
    ),
    "CMYK": (lambda: encoded(GREY.convert("CMYK"), "JPEG"), (64, 48)),
    "YCbCr": (lambda: encoded(GREY.convert("YCbCr"), "JPEG"), (64, 48)),
    "rotated by EXIF": (rotated, (48, 64)),
    "animated": (animated, (20, 10)),
    "WebP": (lambda: encoded(GREY.convert("RGB"), "WEBP"), (64, 48)),
    "1×1": (lambda: encoded(Image.new("RGB", (1, 1), (9, 9, 9)), "PNG"), (1, 1)),
    "20 megapixels": (lambda: encoded(Image.new("RGB", (5472, 3648), (9, 99, 9)), "JPEG"), (5472, 3648)),
}


def cells(contents: list[bytes | None], labels: list[int | None]) -> pa.Table:
    rows = [{"bytes": content, "path": f"{i}"} for i, content in enumerate(contents)]
    return pa.table({"image": pa.array(rows, IMAGES), "label": pa.array(labels, pa.int64())})


BROKEN = encoded(GREY, "JPEG")[:300]


CONFIG: dict[str, Any] = {
    "input_size": (3, 16, 16),
    "interpolation": "bicubic",
    "mean": (0.5, 0.5, 0.5),
    "std": (0.5, 0.5, 0.5),
    "crop_pct": 1.0,
    "crop_mode": "center",
}
