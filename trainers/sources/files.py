"""The Parquet files that a path, a folder or a glob names, on any pyarrow file system."""

from __future__ import annotations

import re
from pathlib import PurePosixPath

from pyarrow import fs

from pruners.errors import InputError, first_line
from trainers.remote_calls import call_limited
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
"""Words in the names of files that the hub's ``datasets`` reads as the name of a split of the data."""
_PART = re.compile(rf"(?:^|[-._ 0-9/])({'|'.join(sorted(PARTS, key=len, reverse=True))})(?=[-._ 0-9/]|$)")


def part_of(name: str) -> str | None:
    """``train``, ``validation`` or ``test``, if a file's name (``train-00000-of-00002.parquet``) has it."""
    match = _PART.search(name.lower())
    return _PARTS[match[1]] if match else None


def parts_of(names: list[str]) -> dict[str, str]:
    """The parts of the data that files belong to by their names, each with the first such file."""
    first_files: dict[str, str] = {}
    for name in names:
        part = part_of(name)
        if part is not None:
            first_files.setdefault(part, name)
    return first_files


def split_glob(uri: str) -> tuple[str, str | None]:
    """Split a path or URI before its first part with ``*``, ``?`` or ``[…]``.

    In a URI ``?`` begins its options, which stay with the first half.

    Returns:
        The folder, and the pattern; the pattern is ``None`` where the path has none, or where a file of
        exactly this name exists on this machine.
    """
    url = "://" in uri
    path, mark, options = uri.partition("?") if url else (uri, "", "")
    first = re.search(r"[*\[]" if url else r"[*?\[]", path)
    if first is None or (not url and exists(uri)):
        return uri, None
    folder, slash, _ = path[: first.start()].rpartition("/")
    return f"{folder or ('/' if slash else '.')}{mark}{options}", path[len(folder) + len(slash) :]


def table_files(uri: str, key: str) -> tuple[fs.FileSystem, list[str]]:
    """Find the Parquet files of a path, a folder or a glob.

    Args:
        uri: a path or any pyarrow URI.
        key: the recipe key or option that named it, for error messages.

    Returns:
        The file system, and the paths in it in the order of their names.

    Raises:
        InputError: there is none, or there are files of several parts (``train-…`` and ``test-…``).
    """
    base, pattern = split_glob(uri)
    about = info(base, key)
    system, path = resolve(base, key)
    if about.type == fs.FileType.NotFound:
        raise InputError(key, uri, "no such file; must be a Parquet file, a folder of them or a glob")
    if about.type == fs.FileType.File:
        return system, [path]
    if about.type != fs.FileType.Directory:  # a device, a pipe: it may never end
        raise InputError(key, uri, "must be a Parquet file, a folder of them or a glob, and is none of these")
    deep = pattern is not None and "/" in pattern
    try:
        entries = call_limited(base, system.get_file_info, fs.FileSelector(path, recursive=deep))
    except OSError as error:
        raise InputError(key, uri, f"cannot be reached ({first_line(error)})") from None
    entries_by_name = {PurePosixPath(entry.path).relative_to(path).as_posix(): entry for entry in entries}
    files = sorted(name for name, entry in entries_by_name.items() if _wanted(name, entry, pattern))
    if not files:
        raise InputError(key, uri, _no_files_message(entries_by_name, pattern))
    parts = parts_of(files)
    if len(parts) > 1:
        mixed = ", ".join(f"{part} ({name})" for part, name in parts.items())
        example = "train" if "train" in parts else next(iter(parts))
        raise InputError(key, uri, f"holds files of several parts: {mixed}; name one, as {example}-*.parquet")
    return system, [entries_by_name[name].path for name in files]


def _wanted(name: str, entry: fs.FileInfo, pattern: str | None) -> bool:
    if entry.type == fs.FileType.Directory or PurePosixPath(name).name.startswith("."):
        return False
    if pattern is None:
        return name.endswith(".parquet")
    return name.count("/") == pattern.count("/") and PurePosixPath(name).match(pattern)


def _no_files_message(entries: dict[str, fs.FileInfo], pattern: str | None) -> str:
    if pattern is not None:
        return f"no file matches {pattern}"
    folders = sorted(name for name, entry in entries.items() if entry.type == fs.FileType.Directory)
    below = f"; it holds folders ({', '.join(folders[:3])}), of which one may be meant" if folders else ""
    return f"the folder must hold *.parquet files{below}"
