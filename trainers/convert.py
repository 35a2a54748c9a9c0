"""Folders of images and WebDataset tars as Parquet shards in the Hugging Face layout.

The bytes of each image are copied as they are. A shard takes its name when it is whole, so that a conversion
that was broken off goes on with the shards that are missing.
"""

from __future__ import annotations

import hashlib
import json
import tarfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pruners.errors import InputError

EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp", ".gif")
CLASSES, PLAN = "classes.json", "conversion.json"
_SHARD_BYTES = 256 << 20
_GROUP = 256  # images of a Parquet row group
_IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


@dataclass(frozen=True)
class Shard:
    """What one Parquet file is made of: image files with their labels, or one tar."""

    name: str
    files: tuple[tuple[str, int], ...] = ()
    tar: str | None = None


@dataclass(frozen=True)
class Conversion:
    """All shards; ``classes`` are in the order of their labels (none where tars hold labels alone)."""

    source: str
    shards: tuple[Shard, ...]
    classes: tuple[str, ...]

    def fingerprint(self) -> str:
        content = [(shard.name, shard.files, shard.tar) for shard in self.shards]
        return hashlib.sha256(json.dumps([content, self.classes]).encode()).hexdigest()


def plan(source: Path, *, shard_bytes: int = _SHARD_BYTES) -> Conversion:
    """What a folder of class folders (as torchvision's ImageFolder), or of tars (WebDataset), turns into.

    Raises:
        InputError: no such folder, or neither of the two.
    """
    key, given = "IMAGEFOLDER", str(source)
    if not source.exists():
        raise InputError(key, given, "no such folder")
    tars = [source] if source.suffix == ".tar" else sorted(source.glob("*.tar"))
    if tars:
        shards = tuple(Shard(f"{tar.stem}.parquet", tar=str(tar)) for tar in tars)
        return Conversion(given, shards, ())
    if not source.is_dir():
        raise InputError(key, given, "must be a folder of class folders, a .tar, or a folder of them")
    classes = tuple(sorted(entry.name for entry in source.iterdir() if entry.is_dir()))
    if not classes:
        raise InputError(key, given, "must hold a folder for each class, or .tar files")
    found: list[list[tuple[str, int]]] = [[]]
    taken = 0
    for label, name in enumerate(classes):
        files = sorted(path for path in (source / name).rglob("*") if path.suffix.lower() in EXTENSIONS)
        if not files:
            raise InputError(key, given, f"class folder {name!r} holds no image")
        for path in files:
            size = path.stat().st_size
            if found[-1] and taken + size > shard_bytes:
                found.append([])
                taken = 0
            found[-1].append((str(path), label))
            taken += size
    shards = tuple(
        Shard(f"{number:05d}-of-{len(found):05d}.parquet", files=tuple(files))
        for number, files in enumerate(found)
    )
    return Conversion(given, shards, classes)


def convert(conversion: Conversion, target: Path, processes: int) -> Iterator[tuple[str, int]]:
    """Write the shards that are missing; gives (name, images) of each shard as it is there.

    Raises:
        InputError: the target holds another conversion, or a shard cannot be made.
    """
    target.mkdir(parents=True, exist_ok=True)
    known = target / PLAN
    mark = conversion.fingerprint()
    if known.exists():
        if json.loads(known.read_text()).get("fingerprint") != mark:
            raise InputError("OUT", str(target), f"holds a conversion of something else ({PLAN})")
    elif any(target.iterdir()):
        raise InputError("OUT", str(target), "must be an empty folder, or a conversion that was broken off")
    known.write_text(json.dumps({"source": conversion.source, "fingerprint": mark}, indent=1))
    if conversion.classes:
        names = {name: label for label, name in enumerate(conversion.classes)}
        (target / CLASSES).write_text(json.dumps(names, indent=1))
    missing = []
    for shard in conversion.shards:
        if (target / shard.name).exists():
            yield shard.name, pq.read_metadata(target / shard.name).num_rows
        else:
            missing.append(shard)
    if not missing:
        return
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        jobs = {pool.submit(_write, shard, conversion.classes, target): shard for shard in missing}
        try:
            for job in as_completed(jobs):
                yield jobs[job].name, job.result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _write(shard: Shard, classes: Sequence[str], target: Path) -> int:
    """One Parquet file; returns its number of images."""
    schema = pa.schema([("image", _IMAGE), ("label", pa.int64())], metadata=_features(classes))
    partial = target / f".{shard.name}.partial"
    count = 0
    try:
        with pq.ParquetWriter(partial, schema, compression="none") as writer:
            for batch in _batches(_rows(shard)):
                writer.write_table(pa.Table.from_pylist(batch, schema=schema))
                count += len(batch)
        partial.replace(target / shard.name)
    finally:
        partial.unlink(missing_ok=True)
    return count


def _rows(shard: Shard) -> Iterator[dict[str, Any]]:
    if shard.tar is not None:
        yield from _of_tar(Path(shard.tar))
        return
    for file, label in shard.files:
        path = Path(file)
        try:
            content = path.read_bytes()
        except OSError as error:
            raise InputError("IMAGEFOLDER", file, f"cannot be read ({error.strerror})") from None
        yield {"image": {"bytes": content, "path": path.name}, "label": label}


def _of_tar(path: Path) -> Iterator[dict[str, Any]]:
    """Images of a WebDataset tar: files of one stem belong together, ``.cls`` or ``.json`` has the label."""
    waiting: dict[str, dict[str, bytes]] = {}
    try:
        with tarfile.open(path) as tar:
            for member in tar:
                stem, _, kind = member.name.rpartition("/")[2].partition(".")
                opened = tar.extractfile(member)
                if opened is None:
                    continue
                place = f"{member.name.rpartition('/')[0]}/{stem}"
                sample = waiting.setdefault(place, {})
                sample[kind.lower()] = opened.read()
                row = _sample(stem, sample, path)
                if row is not None:
                    del waiting[place]
                    yield row
    except tarfile.TarError as error:
        raise InputError("IMAGEFOLDER", str(path), f"must be a readable tar ({error})") from None
    if waiting:
        stem = next(iter(waiting))
        held = ", ".join(waiting[stem])
        raise InputError("IMAGEFOLDER", str(path), f"{stem} has no image or no label (.cls); it has {held}")


def _sample(stem: str, sample: dict[str, bytes], path: Path) -> dict[str, Any] | None:
    """The row of a sample that is complete."""
    image = next((kind for kind in sample if f".{kind}" in EXTENSIONS), None)
    if image is None or not ({"cls", "json"} & set(sample)):
        return None
    try:
        label = int(sample["cls"]) if "cls" in sample else int(json.loads(sample["json"])["label"])
    except (ValueError, KeyError, TypeError):
        raise InputError("IMAGEFOLDER", str(path), f"{stem} has a label that is no number") from None
    return {"image": {"bytes": sample[image], "path": f"{stem}.{image}"}, "label": label}


def _batches(rows: Iterator[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    batch: list[dict[str, Any]] = []
    for row in rows:
        batch.append(row)
        if len(batch) == _GROUP:
            yield batch
            batch = []
    if batch:
        yield batch


def _features(classes: Sequence[str]) -> dict[str, str]:
    """What the hub's viewers and ``datasets`` read: an image, and a label with the names of its classes."""
    label: dict[str, Any] = {"dtype": "int64", "_type": "Value"}
    if classes:
        label = {"names": list(classes), "_type": "ClassLabel"}
    features = {"image": {"_type": "Image"}, "label": label}
    return {"huggingface": json.dumps({"info": {"features": features}})}
