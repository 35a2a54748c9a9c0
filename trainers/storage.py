"""Files and folders on any pyarrow file system (``file://``, ``s3://``, …), which all nodes can read."""

from __future__ import annotations

import hashlib
import json
import math
import tempfile
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
from pyarrow import fs

from pruners.errors import InputError, first_line
from trainers.remote_calls import call_interruptible, call_limited, is_remote

RECORDS = ("pruning.json", "quantization.json")
"""Records that are written last into a checkpoint or INT8 folder: a folder that has one is complete."""


def resolve(uri: str, key: str = "storage") -> tuple[fs.FileSystem, str]:
    """Find the file system of a path or URI, and the path in it; relative paths become absolute.

    Args:
        uri: a local path or any pyarrow URI.
        key: the option or recipe key that named it, for error messages.

    Raises:
        UnreachableError: a host that does not answer.
        InputError: a scheme that pyarrow does not know, a missing bucket, or the home of an unknown user.
    """
    if "://" not in uri:
        return fs.LocalFileSystem(), absolute(uri, key)
    try:
        system, path = call_limited(uri, fs.FileSystem.from_uri, uri)
    except OSError as error:  # pyarrow asks a bucket for its region
        raise UnreachableError(key, uri, f"cannot be reached ({first_line(error)})") from None
    except (pa.ArrowException, ValueError) as error:
        raise InputError(key, uri, f"must be a path or a pyarrow URI ({first_line(error)})") from None
    if not path:
        raise InputError(key, uri, "must be a path or a pyarrow URI with a bucket, as s3://bucket/folder")
    return system, path


class UnreachableError(InputError):
    """A path or URI that may be right, but does not answer from this machine."""


def absolute(uri: str, key: str = "storage") -> str:
    """Make a local path absolute; URIs stay as they are.

    Raises:
        InputError: the home of an unknown user (``~name``).
    """
    if "://" in uri:
        return uri
    try:
        return str(Path(uri).expanduser().absolute())
    except RuntimeError as error:
        raise InputError(key, uri, f"must be a path or a pyarrow URI ({first_line(error)})") from None


def info(uri: str, key: str = "storage") -> fs.FileInfo:
    """Ask whether a path or URI is a file, a folder, or missing; errors name the key.

    Raises:
        UnreachableError: a remote file system that cannot be asked.
        InputError: as :func:`resolve`.
    """
    system, path = resolve(uri, key)
    try:
        return call_limited(uri, system.get_file_info, path)
    except OSError as error:
        kind = UnreachableError if is_remote(uri) else InputError
        raise kind(key, uri, f"cannot be reached ({first_line(error)})") from None


def exists(uri: str) -> bool:
    """Return whether a file or folder exists."""
    system, path = resolve(uri)
    return bool(call_limited(uri, system.get_file_info, path).type != fs.FileType.NotFound)


def names(uri: str) -> list[str]:
    """Names of the entries of a folder, sorted; empty where there is no folder."""
    system, path = resolve(uri)
    entries = call_limited(uri, system.get_file_info, fs.FileSelector(path, allow_not_found=True))
    return sorted(entry.base_name for entry in entries if not entry.base_name.endswith(".partial"))


def read_bytes(uri: str) -> bytes:
    """Read a file."""
    system, path = resolve(uri)

    def read() -> bytes:
        with system.open_input_stream(path) as stream:
            return bytes(stream.read())

    return call_interruptible(uri, read)


def write_bytes(uri: str, content: bytes) -> None:
    """Write a file atomically."""
    system, path = resolve(uri)
    call_limited(uri, _write, system, path, content)


def _write(system: fs.FileSystem, path: str, content: bytes) -> None:
    system.create_dir(str(Path(path).parent), recursive=True)
    if isinstance(system, fs.LocalFileSystem):
        partial = Path(f"{path}.{uuid.uuid4().hex[:8]}.partial")  # others may be writing it too
        try:
            partial.write_bytes(content)
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)
        return
    with system.open_output_stream(path) as stream:  # in object stores a file appears when it is closed
        stream.write(content)


def read_json(uri: str) -> Any:
    """Read a JSON file.

    Raises:
        InputError: the file is no JSON.
    """
    try:
        return json.loads(read_bytes(uri))
    except ValueError as error:
        raise InputError("file", uri, f"must hold JSON ({first_line(error)})") from None


def write_json(uri: str, content: Any) -> None:
    """Write a JSON file atomically, as :func:`as_json` formats it."""
    write_bytes(uri, as_json(content).encode())


def as_json(content: Any, *, sort_keys: bool = True) -> str:
    """Format JSON that any parser reads: numbers that are not finite become ``null``, as it has none."""
    return json.dumps(_finite(content), indent=1, sort_keys=sort_keys, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def is_local(uri: str) -> bool:
    """Return whether a path or URI lies on this machine's file system."""
    return isinstance(resolve(uri)[0], fs.LocalFileSystem)


@contextmanager
def writing(uri: str) -> Iterator[Path]:
    """A local folder to fill in a ``with`` block; at its end it replaces the folder ``uri``, atomically."""
    system, path = resolve(uri)
    if not isinstance(system, fs.LocalFileSystem):
        with tempfile.TemporaryDirectory(prefix="espalier-") as folder:
            yield Path(folder)
            upload(Path(folder), uri)
        return
    partial = f"{path}.partial"
    if Path(partial).exists():
        system.delete_dir(partial)
    system.create_dir(partial, recursive=True)
    yield Path(partial)
    if Path(path).exists():
        system.delete_dir(path)
    Path(partial).replace(path)


def upload(folder: Path, uri: str) -> None:
    """Copy a local folder to ``uri``, replacing what was there.

    A local target gets its name only when it is complete. On other file systems the files of :data:`RECORDS`
    are deleted first and written last, so that a folder that has one of them is complete.
    """
    system, path = resolve(uri)
    if isinstance(system, fs.LocalFileSystem):
        with writing(uri) as partial:
            fs.copy_files(str(folder), str(partial), destination_filesystem=system)
        return
    call_interruptible(uri, _upload, folder, system, path)


def _upload(folder: Path, system: fs.FileSystem, path: str) -> None:
    for name in RECORDS:
        if system.get_file_info(f"{path}/{name}").type == fs.FileType.File:
            system.delete_file(f"{path}/{name}")
    if system.get_file_info(path).type == fs.FileType.Directory:
        system.delete_dir(path)
    system.create_dir(path, recursive=True)
    systems = {"source_filesystem": fs.LocalFileSystem(), "destination_filesystem": system}
    for entry in sorted(folder.iterdir(), key=lambda entry: (entry.name in RECORDS, entry.name)):
        fs.copy_files(str(entry), f"{path}/{entry.name}", **systems)


@contextmanager
def local_copy(uri: str) -> Iterator[Path]:
    """A folder as a local path: the folder itself where it is local, else a temporary copy."""
    system, path = resolve(uri)
    if isinstance(system, fs.LocalFileSystem):
        yield Path(path)
        return
    local = fs.LocalFileSystem()
    with tempfile.TemporaryDirectory(prefix="espalier-") as target:
        call_interruptible(
            uri, fs.copy_files, path, target, source_filesystem=system, destination_filesystem=local
        )
        yield Path(target)


@contextmanager
def local_file(uri: str) -> Iterator[Path]:
    """A file as a local path, with its own name: the file itself where it is local, else a temporary copy."""
    system, path = resolve(uri)
    if isinstance(system, fs.LocalFileSystem):
        yield Path(path)
        return
    with tempfile.TemporaryDirectory(prefix="espalier-") as folder:
        target = Path(folder) / Path(path).name
        systems = {"source_filesystem": system, "destination_filesystem": fs.LocalFileSystem()}
        call_interruptible(uri, fs.copy_files, path, str(target), **systems)
        yield target


def copy(source: str, target: str) -> None:
    """Copy a folder to another path or URI, as :func:`upload` does."""
    with local_copy(source) as folder:
        upload(folder, target)


def remove(uri: str) -> None:
    """Delete a folder, if it exists."""
    if info(uri).type == fs.FileType.Directory:
        system, path = resolve(uri)
        call_limited(uri, system.delete_dir, path)


def remove_file(uri: str) -> None:
    """Delete a file."""
    system, path = resolve(uri)
    call_limited(uri, system.delete_file, path)


def size(uri: str) -> int:
    """Size of a file in bytes."""
    return int(info(uri).size)


def sha256(uri: str) -> str:
    """SHA-256 of a file's content, as hexadecimal digits."""
    system, path = resolve(uri)

    def read() -> str:
        digest = hashlib.sha256()
        with system.open_input_stream(path) as stream:
            while chunk := stream.read(1 << 24):
                digest.update(chunk)
        return digest.hexdigest()

    return call_interruptible(uri, read)
