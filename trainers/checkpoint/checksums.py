"""Checksums of a folder's files: recorded when it is written, compared before anything in it is used."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from pruners.errors import InputError


def sha256(path: Path) -> str:
    """Of a file's content, as hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def as_json(record: Mapping[str, Any]) -> str:
    """A record as text that any reader of JSON takes: a figure that is not finite becomes ``null``."""
    return json.dumps(_finite(record), indent=1, sort_keys=True, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def sums(folder: Path, names: Iterable[str]) -> dict[str, str]:
    """What a record says of these files of a folder: name -> SHA-256."""
    return {name: sha256(folder / name) for name in names}


def read_verified(
    folder: Path,
    record: str,
    place: str,
    *,
    key: str,
    writer: str = "espalier",
    fits: Callable[[dict[str, Any]], bool] = lambda content: True,
) -> dict[str, Any]:
    """The record of a folder, after checking the files that it lists.

    Args:
        record: its name in the folder; JSON with the checksums as ``files``.
        place: the folder as its user knows it.
        fits: whether the content is of the kind that is asked for.

    Raises:
        InputError: it is no such record, or a file is missing or changed.
    """
    try:
        content: dict[str, Any] = json.loads((folder / record).read_text(encoding="utf-8"))
        expected = dict(content["files"])
        if any(Path(name).name != name for name in expected) or not fits(content):
            raise ValueError("of other folders, or of another kind")
    except (OSError, ValueError, KeyError, TypeError):
        raise InputError(key, place, f"{record} must be a record written by {writer}") from None
    for name, checksum in expected.items():
        if not (folder / name).is_file():
            raise InputError(key, place, f"{name} is missing; {record} lists it")
        if sha256(folder / name) != checksum:
            raise InputError(key, place, f"{name} is not the file that {record} describes (checksum differs)")
    return content
