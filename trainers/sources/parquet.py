"""Read and check Parquet tables of images, without torch."""

from __future__ import annotations

import hashlib
import io
import struct
import zlib
from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from PIL import Image, ImageOps, UnidentifiedImageError

from pruners.errors import InputError, first_line
from trainers.sources.columns import Columns
from trainers.sources.files import table_files

# what Pillow's decoders raise for broken bytes, besides OSError
_BROKEN = (
    SyntaxError,
    ValueError,
    EOFError,
    IndexError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)


# a camera stores the pixels as its sensor gave them, and notes here how it was held
_ORIENTATION_KEYS = frozenset({"exif", "Raw profile type exif", "XML:com.adobe.xmp", "xmp"})


_ROWS = (256, 16, 1)
"""Rows of a batch, largest first: Arrow's arrays of a struct hold at most 2 GB, so large images need smaller
batches."""
_LARGE_BATCH = 256 << 20  # bytes; where the first size of a batch would take more, the second is used
_BUFFER = 8 << 20  # bytes of a column that are read at once


def read_table(
    uri: str, columns: list[str] | None = None, *, key: str = "data", wanted: Columns | None = None
) -> pa.Table:
    """Read a Parquet file, or those of a folder or glob in the order of their names.

    Args:
        uri: a path or any pyarrow URI of a file, a folder or a glob.
        columns: ``image``, ``label`` or both; default: both.
        key: the recipe key that named the data, for error messages.
        wanted: the columns that the user named.

    Returns:
        A table with the columns ``image`` and ``label``, or those of ``columns``.

    Raises:
        InputError: missing, unreadable, or without such columns.
    """
    system, files = table_files(uri, key)
    wanted = wanted or Columns()
    find = {"image": wanted.find_image, "label": wanted.find_label}
    parts = []
    try:
        for file in files:
            schema = pq.read_schema(file, filesystem=system)
            chosen = {find[column](schema, uri, key): column for column in columns or find}
            part = pq.read_table(file, columns=list(chosen), filesystem=system).select(list(chosen))
            parts.append(part.rename_columns(list(chosen.values())))
        return pa.concat_tables(parts, promote_options="permissive")
    except (pa.ArrowException, OSError) as error:
        reason = first_line(error)
        raise InputError(key, uri, f"must be a readable Parquet file, or several alike ({reason})") from None


def image_batches(
    file: pq.ParquetFile, group: int, image: str, label: str | None = None
) -> Iterator[pa.Table]:
    """Read a row group in batches, however large it is and whichever of Arrow's types its images have.

    Args:
        file: an open Parquet file.
        group: number of the row group.
        image: name of the image column.
        label: name of the label column; ``None``: labels are not read.

    Yields:
        Tables with the columns ``image`` (encoded, ``large_binary``) and ``label`` (as it is stored).

    Raises:
        pyarrow.ArrowException: a file that cannot be decoded.
        OSError: a file that cannot be read.
    """
    facts = file.metadata.row_group(group)
    done, columns = 0, [image] if label is None else [image, label]
    large = facts.total_byte_size / max(facts.num_rows, 1) * _ROWS[0] > _LARGE_BATCH
    for rows in _ROWS[large:]:
        first = 0
        try:
            for batch in file.iter_batches(rows, row_groups=[group], columns=columns):
                if first >= done:
                    table = {"image": encoded(batch[image])}
                    yield pa.table(table if label is None else table | {"label": batch[label]})
                    done = first + len(batch)
                first += len(batch)
            return
        except pa.ArrowNotImplementedError:  # more than 2 GB in so many rows
            if rows == _ROWS[-1]:
                raise


def encoded(cells: pa.Array) -> pa.Array:
    """The encoded images of a column of bytes, or of ``{bytes, path}``; what is neither is null."""
    if pa.types.is_struct(cells.type):
        index = cells.type.get_field_index("bytes")
        cells = pc.struct_field(cells, index) if index >= 0 else pa.nulls(len(cells))
    try:
        return cells.cast(pa.large_binary())
    except pa.ArrowNotImplementedError:
        return pa.nulls(len(cells), pa.large_binary())


def open_parquet(source: pa.NativeFile) -> pq.ParquetFile:
    """A Parquet file whose columns are read piece by piece, so that no large row group is in memory."""
    return pq.ParquetFile(source, buffer_size=_BUFFER, pre_buffer=False)


def check_table(
    uri: str, classes: int, *, key: str, tolerant: bool = False, columns: Columns | None = None
) -> str:
    """Check the labels and one image before a run starts, and compute the table's fingerprint.

    The fingerprint covers all labels, the files' sizes, and the images of each file's first row group
    (every image of a small set), so that it takes seconds for a large one.

    Args:
        uri: a Parquet file, a folder or a glob.
        classes: number of classes of the model.
        key: the recipe key that named the data, for error messages.
        tolerant: accept rows without a label and images that cannot be decoded.
        columns: the columns that the user named.

    Returns:
        SHA-256 as hexadecimal digits.

    Raises:
        InputError: labels missing, of another type or outside 0…classes-1; an image that cannot be decoded.
    """
    wanted = columns or Columns()
    values = _checked_labels(uri, classes, key, tolerant=tolerant, columns=wanted)
    digest = hashlib.sha256(values.tobytes())
    system, files = table_files(uri, key)
    seen = tolerant
    for file in files:
        digest.update(str(system.get_file_info(file).size).encode())
        with system.open_input_file(file) as source:
            parquet = open_parquet(source)
            image = wanted.find_image(parquet.schema_arrow, uri, key)
            for batch in image_batches(parquet, 0, image) if parquet.num_row_groups else ():
                images = batch["image"].to_pylist()
                if images and not seen:
                    _check_image(images[0], uri, key)
                    seen = True
                for content in images:
                    digest.update(hashlib.sha256(content or b"").digest())
    return digest.hexdigest()


def _checked_labels(
    uri: str, classes: int, key: str, *, tolerant: bool, columns: Columns
) -> np.ndarray[tuple[int], np.dtype[np.integer]]:
    labels = read_table(uri, ["label"], key=key, wanted=columns)["label"]
    if tolerant:
        labels = labels.drop_null()
    if not len(labels):
        raise InputError(key, uri, f"must hold at least one image{' with a label' * tolerant}")
    if not pa.types.is_integer(labels.type):
        raise InputError(key, uri, f"labels must be integers, not {labels.type}")
    if labels.null_count:
        raise InputError(key, uri, f"{labels.null_count} images have no label")
    values: np.ndarray[tuple[int], np.dtype[np.integer]] = labels.to_numpy()
    least, most = int(values.min()), int(values.max())
    if least < 0 or most >= classes:
        worst = least if least < 0 else most
        hint = (
            "; labels count from 0, and these seem to count from 1" if (least, most) == (1, classes) else ""
        )
        raise InputError(key, uri, f"label {worst} lies outside the model's classes 0…{classes - 1}{hint}")
    return values


def count_rows(uri: str, *, key: str = "data") -> int:
    """Count the rows of a Parquet file, or of all files of a folder or glob, by their footers.

    Raises:
        InputError: there is none.
    """
    system, files = table_files(uri, key)
    return sum(pq.read_metadata(file, filesystem=system).num_rows for file in files)


def _check_image(cell: object, uri: str, key: str) -> None:
    try:
        decode(cell)
    except (OSError, TypeError, KeyError) as error:
        raise InputError(key, uri, f"row 0 holds no image that can be decoded ({error})") from None


def _content(cell: object) -> bytes | None:
    content = cell["bytes"] if isinstance(cell, dict) else cell
    return content if isinstance(content, bytes) else None


def decode(cell: object) -> Image.Image:
    """Decode an image to RGB, turned upright by its EXIF data; of several frames the first is taken.

    Args:
        cell: ``{bytes, path}``, or the encoded bytes.

    Raises:
        TypeError: the cell holds no bytes.
        OSError: the bytes are no image, or a broken one.
    """
    content = _content(cell)
    if content is None:
        raise TypeError("no bytes")
    try:
        image: Image.Image = Image.open(io.BytesIO(content))
        if image.format in ("JPEG", "MPO") and not _ORIENTATION_KEYS.isdisjoint(image.info):
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
    except UnidentifiedImageError:  # Pillow's message has an address in memory
        raise OSError("no image of a known format") from None
    except _BROKEN as error:
        raise OSError(str(error) or type(error).__name__) from None
