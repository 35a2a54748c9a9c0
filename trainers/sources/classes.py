"""The names of classes: those of a table, those of a file, and whether several agree."""

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
    """A class map: JSON (label by name, or a list), or a text file with a name a line.

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
    """Names in the order of their labels; nothing if they have no such order."""
    if isinstance(content, list):
        return content if all(isinstance(name, str) for name in content) else []
    if not isinstance(content, dict) or not all(type(label) is int for label in content.values()):
        return []
    if sorted(content.values()) != list(range(len(content))):
        return []
    return sorted(content, key=content.__getitem__)


def names_of(uri: str, *, key: str = "data", columns: Columns | None = None, every: bool = False) -> Names:
    """What a table calls its classes, in its metadata or in ``classes.json`` beside it; ``()`` if unknown.

    Args:
        columns: those that the user named.
        every: look at all files, and not at the first alone.

    Raises:
        InputError: no such table, or one whose files, or whose ``classes.json``, call the classes otherwise.
    """
    system, files = table_files(uri, key)
    wanted = columns or Columns()
    found: dict[str, Names] = {}
    for file in files if every else files[:1]:
        try:
            schema = pq.read_schema(file, filesystem=system)
        except (pa.ArrowException, OSError):
            continue  # whoever reads the table will say so
        if names := class_names(schema, wanted.find_label(schema, uri, key)):
            found[Path(file).name] = names
    if beside := names_beside(uri):
        found[CLASSES] = beside
    check_alike(found, key=key, uri=uri)
    return max(found.values(), key=len, default=())


def names_beside(uri: str) -> Names:
    """Those that ``espalier data convert`` left in the folder of a table (or in that of a glob)."""
    base, _ = split_glob(uri)
    system, path = storage.resolve(base)
    place = f"{path}/{CLASSES}"
    if system.get_file_info([place])[0].type != fs.FileType.File:
        return ()
    with system.open_input_stream(place) as stream:
        content = bytes(stream.read())
    try:
        return tuple(_ordered(json.loads(content)))
    except ValueError:
        return ()


def check_alike(names: Mapping[str, Sequence[str]], *, key: str, uri: str | None = None) -> None:
    """Whether several lists call each label the same; a list may be shorter than another, or empty.

    Args:
        names: by what they are the names of (a part of the data, a file).

    Raises:
        InputError: naming the first label that has two names.
    """
    known: dict[int, tuple[str, str]] = {}
    for source, ours in names.items():
        for label, name in enumerate(ours):
            other, before = known.setdefault(label, (source, name))
            if before != name:
                said = f"label {label} is {before!r} in {other} and {name!r} in {source}"
                hint = "convert them with one class map: --classes"
                raise InputError(key, uri, f"classes contradict each other: {said}; {hint}")


def check_known(model: Sequence[str], images: Sequence[str], *, key: str, uri: str) -> None:
    """Whether a model's classes are those of the images, as far as both use the same names.

    Of names that only one of them knows (``n01440764``, ``tench``) nothing can be told.

    Raises:
        InputError: a name that is another label for the model than in the images.
    """
    labels = {name: label for label, name in enumerate(model)}
    if len(labels) < len(model):
        return  # two classes of one name
    for label, name in enumerate(images):
        if labels.get(name, label) != label:
            said = f"{name!r} is label {label} of the images and {labels[name]} of the model"
            raise InputError(key, uri, f"its classes contradict the model's: {said}")
