"""Checksums of a folder's files: recorded when it is written, verified before it is used."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from pruners.errors import InputError


def sha256(path: Path) -> str:
    """SHA-256 of a file's content, as hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sums(folder: Path, names: Iterable[str]) -> dict[str, str]:
    """SHA-256 of files of a folder, by their names, for its record."""
    return {name: sha256(folder / name) for name in names}


def read_verified(
    folder: Path,
    record: str,
    uri: str,
    *,
    key: str,
    writer: str = "espalier",
    fits: Callable[[dict[str, Any]], bool] = lambda content: True,
) -> dict[str, Any]:
    """Read the record of a folder, and verify the checksums of the files that it lists.

    Args:
        folder: the local folder.
        record: name of the record's file: JSON, with the checksums as ``files``.
        uri: the folder as the user named it, for error messages.
        key: the option or recipe key that named it, for error messages.
        writer: the program that writes such records, for error messages.
        fits: whether the content is of the expected kind.

    Returns:
        The record's content.

    Raises:
        InputError: it is no such record, or a file is missing or changed.
    """
    try:
        content: dict[str, Any] = json.loads((folder / record).read_text(encoding="utf-8"))
        expected = dict(content["files"])
        if any(Path(name).name != name for name in expected) or not fits(content):
            raise ValueError("of other folders, or of another kind")
    except (OSError, ValueError, KeyError, TypeError):
        raise InputError(key, uri, f"{record} must be a record written by {writer}") from None
    for name, checksum in expected.items():
        if not (folder / name).is_file():
            raise InputError(key, uri, f"{name} is missing; {record} lists it")
        if sha256(folder / name) != checksum:
            raise InputError(key, uri, f"{name} is not the file that {record} describes (checksum differs)")
    return content
