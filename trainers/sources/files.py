"""The Parquet files that a path, a folder or a glob names, on any pyarrow file system."""

from __future__ import annotations

import re
from pathlib import PurePosixPath

from pyarrow import fs

from pruners.errors import InputError
from trainers.remote_calls import look
from trainers.storage import exists, info, resolve

_PARTS = {
    "train": "train",
    "training": "train",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "dev": "validation",
    "test": "test",
    "testing": "test",
    "eval": "test",
    "evaluation": "test",
}
PARTS = frozenset(_PARTS)
"""What the hub's ``datasets`` takes for the name of a part of the data, in the names of files."""
_PART = re.compile(rf"(?:^|[-._ 0-9/])({'|'.join(sorted(PARTS, key=len, reverse=True))})(?=[-._ 0-9/]|$)")


def part_of(name: str) -> str | None:
    """``train``, ``validation`` or ``test``, if a file's name (``train-00000-of-00002.parquet``) says so."""
    found = _PART.search(name.lower())
    return _PARTS[found[1]] if found else None


def parts_of(names: list[str]) -> dict[str, str]:
    """The parts that some files belong to by their names, each with the first such file."""
    found: dict[str, str] = {}
    for name in names:
        part = part_of(name)
        if part is not None:
            found.setdefault(part, name)
    return found


def split_glob(uri: str) -> tuple[str, str | None]:
    """A path or URI up to its first part with ``*``, ``?`` or ``[…]``, and the pattern from there on.

    The pattern is ``None`` where there is no such part, or where a file of this very name lies on this
    machine. In a URI ``?`` begins its options, which stay with the first half.
    """
    url = "://" in uri
    path, mark, options = uri.partition("?") if url else (uri, "", "")
    first = re.search(r"[*\[]" if url else r"[*?\[]", path)
    if first is None or (not url and exists(uri)):
        return uri, None
    folder, slash, _ = path[: first.start()].rpartition("/")
    return f"{folder or ('/' if slash else '.')}{mark}{options}", path[len(folder) + len(slash) :]


def table_files(uri: str, key: str) -> tuple[fs.FileSystem, list[str]]:
    """The file system and the Parquet files of a path, a folder or a glob, in the order of their names.

    Raises:
        InputError: there is none, or there are files of several parts (``train-…`` and ``test-…``).
    """
    base, pattern = split_glob(uri)
    there = info(base, key)
    system, path = resolve(base, key)
    if there.type == fs.FileType.NotFound:
        raise InputError(key, uri, "no such file; must be a Parquet file, a folder of them or a glob")
    if there.type == fs.FileType.File:
        return system, [path]
    if there.type != fs.FileType.Directory:  # a device, a pipe: it may never end
        raise InputError(key, uri, "must be a Parquet file, a folder of them or a glob, and is none of these")
    deep = pattern is not None and "/" in pattern
    try:
        entries = look(base, system.get_file_info, fs.FileSelector(path, recursive=deep))
    except OSError as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(key, uri, f"cannot be reached ({reason})") from None
    found = {PurePosixPath(entry.path).relative_to(path).as_posix(): entry for entry in entries}
    files = sorted(name for name, entry in found.items() if _wanted(name, entry, pattern))
    if not files:
        raise InputError(key, uri, _nothing(found, pattern))
    parts = parts_of(files)
    if len(parts) > 1:
        mixed = ", ".join(f"{part} ({name})" for part, name in parts.items())
        one = "train" if "train" in parts else next(iter(parts))
        raise InputError(key, uri, f"holds files of several parts: {mixed}; name one, as {one}-*.parquet")
    return system, [found[name].path for name in files]


def _wanted(name: str, entry: fs.FileInfo, pattern: str | None) -> bool:
    if entry.type == fs.FileType.Directory or PurePosixPath(name).name.startswith("."):
        return False
    if pattern is None:
        return name.endswith(".parquet")
    return name.count("/") == pattern.count("/") and PurePosixPath(name).match(pattern)


def _nothing(found: dict[str, fs.FileInfo], pattern: str | None) -> str:
    if pattern is not None:
        return f"no file matches {pattern}"
    folders = sorted(name for name, entry in found.items() if entry.type == fs.FileType.Directory)
    below = f"; it holds folders ({', '.join(folders[:3])}), of which one may be meant" if folders else ""
    return f"the folder must hold *.parquet files{below}"
