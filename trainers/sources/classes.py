"""Names of classes: read from a table's metadata or from a file, and compared with each other."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs

from pruners.errors import InputError, first_line
from trainers import storage
from trainers.sources.columns import Columns, class_names
from trainers.sources.files import split_glob, table_files

CLASSES = "classes.json"
"""Beside converted images: the label of each class by its name."""

Names = tuple[str, ...]
"""Names of classes in the order of their labels."""


def read_map(file: Path, key: str) -> Names:
    """Read a class map: JSON (label by name, or a list of names), or text with one name on each line.

    Args:
        file: the class map.
        key: the option or recipe key that named it, for error messages.

    Raises:
        InputError: no such file, or labels that are not 0…N-1, each once.
    """
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or first_line(error)
        raise InputError(key, str(file), f"cannot be read ({reason})") from None
    if file.suffix.lower() != ".json":
        names = [line.strip() for line in text.splitlines() if line.strip()]
    else:
        try:
            names = _ordered(json.loads(text))
        except ValueError as error:
            raise InputError(key, str(file), f"must hold JSON ({first_line(error)})") from None
    if not names or len(set(names)) < len(names):
        raise InputError(
            key,
            str(file),
            "must give each of the labels 0…N-1 to one class, as {name: label} or a list of names",
        )
    return tuple(names)


def _ordered(content: Any) -> list[str]:
    """Names in the order of their labels; ``()`` if the labels are not 0…N-1."""
    if isinstance(content, list):
        return content if all(isinstance(name, str) for name in content) else []
    if not isinstance(content, dict) or not all(type(label) is int for label in content.values()):
        return []
    if sorted(content.values()) != list(range(len(content))):
        return []
    return sorted(content, key=content.__getitem__)


def names_of(uri: str, *, key: str = "data", columns: Columns | None = None, every: bool = False) -> Names:
    """Read the names of a table's classes, from its metadata or from ``classes.json`` beside it.

    Args:
        uri: a Parquet file, a folder or a glob.
        key: the recipe key that named it, for error messages.
        columns: the columns that the user named.
        every: read the metadata of all files, not of the first one alone.

    Returns:
        The names in the order of their labels; ``()`` where they are not known.

    Raises:
        InputError: no such table, or its files or its ``classes.json`` contradict each other.
    """
    system, files = table_files(uri, key)
    wanted = columns or Columns()
    names_by_file: dict[str, Names] = {}
    for file in files if every else files[:1]:
        try:
            schema = pq.read_schema(file, filesystem=system)
        except (pa.ArrowException, OSError):
            continue  # reading the table will raise the error
        if names := class_names(schema, wanted.find_label(schema, uri, key)):
            names_by_file[Path(file).name] = names
    if beside := names_beside(uri):
        names_by_file[CLASSES] = beside
    check_alike(names_by_file, key=key, uri=uri)
    return max(names_by_file.values(), key=len, default=())


def names_beside(uri: str) -> Names:
    """Read the names that ``espalier data convert`` wrote into the folder of a table (or of a glob)."""
    base, _ = split_glob(uri)
    system, path = storage.resolve(base)
    map_path = f"{path}/{CLASSES}"
    if system.get_file_info([map_path])[0].type != fs.FileType.File:
        return ()
    with system.open_input_stream(map_path) as stream:
        content = bytes(stream.read())
    try:
        return tuple(_ordered(json.loads(content)))
    except ValueError:
        return ()


def check_alike(names: Mapping[str, Sequence[str]], *, key: str, uri: str | None = None) -> None:
    """Check that several lists give each label the same name; a list may be shorter than another, or empty.

    Args:
        names: lists of names, each by what it belongs to (a part of the data, a file).
        key: the recipe key that named the data, for error messages.
        uri: the data, for error messages.

    Raises:
        InputError: two lists contradict each other; names the first label that has two names.
    """
    known: dict[int, tuple[str, str]] = {}
    for source, ours in names.items():
        for label, name in enumerate(ours):
            other, before = known.setdefault(label, (source, name))
            if before != name:
                conflict = f"label {label} is {before!r} in {other} and {name!r} in {source}"
                hint = "convert them with one class map: --classes"
                raise InputError(key, uri, f"classes contradict each other: {conflict}; {hint}")


def check_known(model: Sequence[str], images: Sequence[str], *, key: str, uri: str) -> None:
    """Check that a model's classes are those of the images, as far as both use the same names.

    Names that only one of them uses (``n01440764`` and ``tench`` for the same class) are not compared.

    Args:
        model: names of the model's classes, in the order of their labels.
        images: names of the images' classes, in the order of their labels.
        key: the recipe key that named the images, for error messages.
        uri: the images, for error messages.

    Raises:
        InputError: a name that is another label for the model than in the images.
    """
    labels = {name: label for label, name in enumerate(model)}
    if len(labels) < len(model):
        return  # two classes have the same name
    for label, name in enumerate(images):
        if labels.get(name, label) != label:
            conflict = f"{name!r} is label {label} of the images and {labels[name]} of the model"
            raise InputError(key, uri, f"its classes contradict the model's: {conflict}")
