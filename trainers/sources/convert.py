"""Convert folders of images and WebDataset tars to Parquet shards in the Hugging Face layout.

The bytes of each image are copied as they are. A shard gets its name when it is complete, so that a
conversion that was interrupted continues with the missing shards.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from concurrent.futures import as_completed
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from filelock import FileLock, Timeout

from pruners.errors import InputError
from trainers.process_pool import process_pool
from trainers.sources.classes import CLASSES, Names
from trainers.sources.files import parts_of, split_glob
from trainers.sources.folders import Labelled, SourceOptions, class_folders, labelled_folder
from trainers.sources.webdataset import is_tar, read_tar, stem

PLAN, _LOCK = "conversion.json", ".lock"
_KEY = "source"
_SHARD_BYTES = 256 << 20
_GROUP = 256  # images of a Parquet row group
_IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
_SKIPPED = b"espalier.skipped"


@dataclass(frozen=True)
class Shard:
    """The source of one Parquet file: image files with their labels, or one tar."""

    name: str
    files: tuple[tuple[str, int], ...] = ()
    tar: str | None = None


@dataclass(frozen=True)
class Written:
    """A shard that exists: its number of images, and how many samples of its tar were left out."""

    name: str
    images: int
    skipped: int = 0


@dataclass(frozen=True)
class Conversion:
    """A planned conversion.

    Attributes:
        source: what is converted, as the user named it.
        shards: the Parquet files to write.
        classes: names in the order of their labels; empty where the source has numbers alone.
        options: how the source is read.
        notes: lines to show to the user.
    """

    source: str
    shards: tuple[Shard, ...]
    classes: Names
    options: SourceOptions = field(default_factory=SourceOptions)
    notes: tuple[str, ...] = ()

    def fingerprint(self) -> str:
        """SHA-256 of all that decides the content of the shards, as hexadecimal digits."""
        content: list[Any] = [[(shard.name, shard.files, shard.tar) for shard in self.shards], self.classes]
        if any(shard.tar for shard in self.shards) and self.options != SourceOptions():
            content.append(asdict(self.options))
        return hashlib.sha256(json.dumps(content, default=str).encode()).hexdigest()


def plan(
    source: Path, options: SourceOptions | None = None, *, shard_bytes: int = _SHARD_BYTES
) -> Conversion:
    """Plan the conversion of class folders (as torchvision's ImageFolder) or of tars (WebDataset).

    Args:
        source: a folder of class folders, a folder of images with a file of labels, a tar, a folder of tars,
            or a glob of tars.
        options: how to read the source.
        shard_bytes: largest size of a shard, by the sizes of its image files.

    Returns:
        The shards to write; nothing is written yet.

    Raises:
        InputError: no such folder, or neither of the two.
    """
    given, options = str(source), options or SourceOptions()
    base, pattern = split_glob(given)
    if pattern is None and not source.exists():
        raise InputError(_KEY, given, "no such folder")
    tars = _tars(Path(base), pattern)
    if tars:
        return _of_tars(given, tars, options)
    if pattern is not None:
        raise InputError(_KEY, given, "no .tar file matches")
    if not source.is_dir():
        raise InputError(_KEY, given, "must be a folder of class folders, a .tar, or a folder of them")
    read = class_folders if options.labels is None else labelled_folder
    classes, files, notes = read(source, options)
    return Conversion(given, _shards(files, shard_bytes), classes, options, tuple(notes))


def _tars(base: Path, pattern: str | None) -> list[Path]:
    if pattern is not None:
        return sorted(path for path in base.glob(pattern) if is_tar(path.name))
    if base.is_dir():
        return sorted(path for path in base.iterdir() if is_tar(path.name) and path.is_file())
    return [base] if is_tar(base.name) else []


def _of_tars(given: str, tars: list[Path], options: SourceOptions) -> Conversion:
    for option, value in (("labels", options.labels), ("ids", options.ids), ("order", options.order)):
        if value is not None:
            raise InputError(option, str(value), "goes with folders; tars hold their labels")
    parts = parts_of([tar.name for tar in tars])
    if len(parts) > 1:
        mixed = ", ".join(f"{part} ({name})" for part, name in parts.items())
        raise InputError(
            _KEY, given, f"holds tars of several parts: {mixed}; name one part by a glob, quoted"
        )
    names = [f"{stem(tar)}.parquet" for tar in tars]
    if len(set(names)) < len(names):
        raise InputError(_KEY, given, "holds two tars of the same name")
    shards = tuple(Shard(name, tar=str(tar)) for name, tar in zip(names, tars, strict=True))
    return Conversion(given, shards, options.classes, options)


def _shards(files: Labelled, shard_bytes: int) -> tuple[Shard, ...]:
    groups: list[list[tuple[str, int]]] = [[]]
    taken = 0
    for path, label in files:
        size = path.stat().st_size
        if groups[-1] and taken + size > shard_bytes:
            groups.append([])
            taken = 0
        groups[-1].append((str(path), label))
        taken += size
    count = len(groups)
    return tuple(
        Shard(f"{number:05d}-of-{count:05d}.parquet", files=tuple(part)) for number, part in enumerate(groups)
    )


def convert(conversion: Conversion, target: Path, processes: int) -> Iterator[Written]:
    """Write the missing shards of a conversion, in several processes.

    Args:
        conversion: as :func:`plan` made it.
        target: the folder to write to; made if need be.
        processes: how many shards are written at once, each by a process of its own.

    Yields:
        Each shard as soon as it exists, those of an earlier call first.

    Raises:
        InputError: the target holds another conversion, another process is writing to it, or a shard cannot
            be made.
    """
    target.mkdir(parents=True, exist_ok=True)
    lock = FileLock(target / _LOCK)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise InputError("target", str(target), "another conversion to it is at work") from None
    try:
        yield from _convert(conversion, target, processes)
    finally:
        (target / _LOCK).unlink(missing_ok=True)
        lock.release()


def _convert(conversion: Conversion, target: Path, processes: int) -> Iterator[Written]:
    record = target / PLAN
    fingerprint = conversion.fingerprint()
    if record.exists():
        if json.loads(record.read_text()).get("fingerprint") != fingerprint:
            raise InputError("target", str(target), f"holds a conversion of something else ({PLAN})")
    elif any(path.name != _LOCK for path in target.iterdir()):
        expected = "must be an empty folder, or a conversion that was broken off"
        raise InputError("target", str(target), expected)
    for partial in target.glob(".*.partial"):  # left by a killed conversion
        partial.unlink()
    record.write_text(json.dumps({"source": conversion.source, "fingerprint": fingerprint}, indent=1))
    if conversion.classes:
        names = {name: label for label, name in enumerate(conversion.classes)}
        (target / CLASSES).write_text(json.dumps(names, indent=1))
    missing = []
    for shard in conversion.shards:
        if (target / shard.name).exists():
            about = pq.read_metadata(target / shard.name)
            yield Written(shard.name, about.num_rows, int((about.metadata or {}).get(_SKIPPED, b"0")))
        else:
            missing.append(shard)
    if not missing:
        return
    with process_pool(processes) as pool:
        classes, options = conversion.classes, conversion.options
        jobs = [pool.submit(_write, shard, classes, target, options) for shard in missing]
        try:
            for job in as_completed(jobs):
                yield job.result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _write(shard: Shard, classes: Sequence[str], target: Path, options: SourceOptions) -> Written:
    """Write one Parquet file."""
    schema = pa.schema([("image", _IMAGE), ("label", pa.int64())], metadata=_features(classes))
    partial = target / f".{shard.name}.partial"
    count = skipped = 0
    try:
        with pq.ParquetWriter(partial, schema, compression="none") as writer:
            for batch in _batches(_rows(shard, options)):
                rows = [row for row in batch if row is not None]
                writer.write_table(pa.Table.from_pylist(rows, schema=schema))
                count += len(rows)
                skipped += len(batch) - len(rows)
            writer.add_key_value_metadata({_SKIPPED: str(skipped)})
        if not count:
            raise InputError(_KEY, shard.tar or shard.name, "holds no image with a label")
        partial.replace(target / shard.name)
    finally:
        partial.unlink(missing_ok=True)
    return Written(shard.name, count, skipped)


def _rows(shard: Shard, options: SourceOptions) -> Iterator[dict[str, Any] | None]:
    if shard.tar is not None:
        for sample in read_tar(Path(shard.tar), options):
            image = None if sample is None else {"bytes": sample.content, "path": sample.name}
            yield None if sample is None else {"image": image, "label": sample.label}
        return
    for file, label in shard.files:
        path = Path(file)
        try:
            content = path.read_bytes()
        except OSError as error:
            raise InputError(_KEY, file, f"cannot be read ({error.strerror})") from None
        yield {"image": {"bytes": content, "path": path.name}, "label": label}


def _batches(rows: Iterator[dict[str, Any] | None]) -> Iterator[list[dict[str, Any] | None]]:
    batch: list[dict[str, Any] | None] = []
    for row in rows:
        batch.append(row)
        if len(batch) == _GROUP:
            yield batch
            batch = []
    if batch:
        yield batch


def _features(classes: Sequence[str]) -> dict[str, str]:
    """Metadata for the hub's viewers and ``datasets``: an image, and a label with the names of classes."""
    label: dict[str, Any] = {"dtype": "int64", "_type": "Value"}
    if classes:
        label = {"names": list(classes), "_type": "ClassLabel"}
    features = {"image": {"_type": "Image"}, "label": label}
    return {"huggingface": json.dumps({"info": {"features": features}})}
