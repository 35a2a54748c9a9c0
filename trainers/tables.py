"""Parquet tables of images: found, checked and read, without torch."""

from __future__ import annotations

import hashlib
import io
import struct
import zlib

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image, ImageOps, UnidentifiedImageError
from pyarrow import fs

from pruners.errors import InputError
from trainers.storage import resolve

# what Pillow's decoders raise on broken bytes, besides OSError
_BROKEN = (
    SyntaxError,
    ValueError,
    EOFError,
    IndexError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)


# cameras leave the pixels as they came, and note here how they held it
_TURNED = frozenset({"exif", "Raw profile type exif", "XML:com.adobe.xmp", "xmp"})


def read_table(uri: str, columns: list[str] | None = None, *, key: str = "data") -> pa.Table:
    """Read a Parquet file, or all ``*.parquet`` of a folder in the order of their names.

    Raises:
        InputError: missing, unreadable, or without the columns ``image`` and ``label``.
    """
    system, files = table_files(uri, key)
    wanted = columns or ["image", "label"]
    try:
        for file in files:
            there = pq.read_schema(file, filesystem=system).names
            for column in wanted:
                if column not in there:
                    raise InputError(key, uri, f"needs a column {column!r}; it has {', '.join(there)}")
        return pa.concat_tables([pq.read_table(file, columns=wanted, filesystem=system) for file in files])
    except (pa.ArrowException, OSError) as error:
        reason = (str(error).splitlines() or ["unreadable"])[0]
        raise InputError(key, uri, f"must be a readable Parquet file, or several alike ({reason})") from None


def check_table(uri: str, classes: int, *, key: str, tolerant: bool = False) -> str:
    """Look at the labels and some images before anything starts; returns the table's fingerprint.

    The fingerprint covers all labels, the files' sizes, and the images of each file's first row group
    (every image of a small set), so that it takes seconds for a large one.

    Args:
        tolerant: rows without a label are no fault, nor is an image that cannot be decoded.

    Raises:
        InputError: labels missing, of another type or outside 0…classes-1; an image that cannot be decoded.
    """
    labels = read_table(uri, ["label"], key=key)["label"]
    if not len(labels):
        raise InputError(key, uri, "must hold at least one image")
    if not pa.types.is_integer(labels.type):
        raise InputError(key, uri, f"labels must be integers, not {labels.type}")
    if tolerant:
        labels = labels.drop_null()
    if labels.null_count:
        raise InputError(key, uri, f"{labels.null_count} images have no label")
    values = labels.to_numpy()
    if values.min() < 0 or values.max() >= classes:
        worst = int(values.min() if values.min() < 0 else values.max())
        raise InputError(key, uri, f"label {worst} lies outside the model's classes 0…{classes - 1}")
    digest = hashlib.sha256(values.tobytes())
    system, files = table_files(uri, key)
    seen = False
    for file in files:
        digest.update(str(system.get_file_info(file).size).encode())
        read_schema = pq.read_schema(file, filesystem=system)
        if "image" not in read_schema.names:
            raise InputError(key, uri, f"needs a column 'image'; it has {', '.join(read_schema.names)}")
        with system.open_input_file(file) as source:
            parquet = pq.ParquetFile(source)
            groups = [0] if parquet.num_row_groups else []
            images = parquet.read_row_groups(groups, columns=["image"])["image"].to_pylist()
        if images and not seen and not tolerant:
            _check_image(images[0], uri, key)
            seen = True
        for cell in images:
            digest.update(hashlib.sha256(_content(cell) or b"").digest())
    return digest.hexdigest()


def count_rows(uri: str, *, key: str = "data") -> int:
    """Rows of a Parquet file, or of all of a folder, as their footers say.

    Raises:
        InputError: there is none.
    """
    system, files = table_files(uri, key)
    return sum(pq.read_metadata(file, filesystem=system).num_rows for file in files)


def table_files(uri: str, key: str) -> tuple[fs.FileSystem, list[str]]:
    """The file system and the Parquet files of a URI, in the order of their names.

    Raises:
        InputError: there is none.
    """
    system, path = resolve(uri, key)
    try:
        info = system.get_file_info(path)
    except OSError as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(key, uri, f"cannot be reached ({reason})") from None
    if info.type == fs.FileType.NotFound:
        raise InputError(key, uri, "no such file; must be a Parquet file or a folder of them")
    if info.type == fs.FileType.File:
        return system, [path]
    found = system.get_file_info(fs.FileSelector(path))
    files = sorted(entry.path for entry in found if entry.path.endswith(".parquet"))
    if not files:
        raise InputError(key, uri, "the folder must hold *.parquet files")
    return system, files


def _check_image(cell: object, uri: str, key: str) -> None:
    try:
        decode(cell)
    except (OSError, TypeError, KeyError) as error:
        raise InputError(key, uri, f"row 0 holds no image that can be decoded ({error})") from None


def _content(cell: object) -> bytes | None:
    content = cell["bytes"] if isinstance(cell, dict) else cell
    return content if isinstance(content, bytes) else None


def decode(cell: object) -> Image.Image:
    """An image in RGB, upright, from its cell: ``{bytes, path}`` or plain bytes; of several frames the first.

    Raises:
        TypeError: no bytes.
        OSError: bytes that are no image, or a broken one.
    """
    content = _content(cell)
    if content is None:
        raise TypeError("no bytes")
    try:
        image: Image.Image = Image.open(io.BytesIO(content))
        if image.format in ("JPEG", "MPO") and not _TURNED.isdisjoint(image.info):
            ImageOps.exif_transpose(image, in_place=True)
        if image.mode == "RGB":
            image.load()
            return image
        if image.mode.startswith("I"):  # 16 bits a pixel, of which Pillow would keep the lower eight
            wide = np.asarray(image).astype(np.float64)
            scale = 257.0 if image.mode.startswith("I;16") or wide.max() > 255 else 1.0
            image = Image.fromarray((wide / scale).round().clip(0, 255).astype(np.uint8))
        elif image.mode == "P" and "transparency" in image.info:
            image = image.convert("RGBA")
        return image.convert("RGB")
    except UnidentifiedImageError:  # Pillow would name a place in memory
        raise OSError("no image of a known format") from None
    except _BROKEN as error:
        raise OSError(str(error) or type(error).__name__) from None
