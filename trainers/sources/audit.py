"""Audit of a Parquet data set: decode every image, count the labels, list the rows that cannot be used."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from concurrent.futures import as_completed
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow as pa

from pruners.errors import first_line
from trainers.process_pool import process_pool
from trainers.sources.columns import Columns
from trainers.sources.files import split_glob, table_files
from trainers.sources.parquet import decode, image_batches, open_parquet
from trainers.storage import resolve

_MOST_BAD_ROWS = 1000  # the largest number of bad rows that are listed for a row group


@dataclass
class DatasetAudit:
    """The content of a data set, or of a part of it.

    Attributes:
        images: number of rows.
        labels: images of each label.
        smallest, largest: (width, height) in pixels of the images with the least and the largest area.
        bad: a line for each row that cannot be used, with file and row.
    """

    images: int = 0
    labels: Counter[int] = field(default_factory=Counter)
    smallest: tuple[int, int] | None = None
    largest: tuple[int, int] | None = None
    bad: list[str] = field(default_factory=list)

    def add(self, other: DatasetAudit) -> None:
        """Add the figures of another part."""
        self.images += other.images
        self.labels += other.labels
        self.bad = sorted(self.bad + other.bad)
        for size in (other.smallest, other.largest):
            self._measure(size)

    def _count(self, where: str, image: bytes | None, label: object) -> None:
        self.images += 1
        try:
            self._measure(decode(image).size)
        except (OSError, TypeError) as error:
            self.bad.append(f"{where}: cannot be decoded ({first_line(error)})")
        if isinstance(label, int) and label >= 0:
            self.labels[label] += 1
        else:
            self.bad.append(f"{where}: has the label {label}")

    def _measure(self, size: tuple[int, int] | None) -> None:
        if size is None:
            return
        area = size[0] * size[1]
        if self.smallest is None or area < self.smallest[0] * self.smallest[1]:
            self.smallest = size
        if self.largest is None or area > self.largest[0] * self.largest[1]:
            self.largest = size


def audit_dataset(
    uri: str, processes: int, columns: Columns | None = None
) -> Iterator[tuple[int, int, DatasetAudit]]:
    """Decode all images and read all labels of a data set, in several processes.

    Args:
        uri: a Parquet file, a folder or a glob.
        processes: how many row groups are read at once, each by a process of its own.
        columns: the columns that the user named; default: found in the schema.

    Yields:
        After each row group: row groups done, row groups in all, and what was found so far.

    Raises:
        InputError: no such file or folder, or a table without such columns.
    """
    system, files = table_files(uri, "uri")
    wanted = columns or Columns()
    parts: list[tuple[str, str, int, tuple[str, str]]] = []
    whole = DatasetAudit()
    for file in files:
        try:
            with system.open_input_file(file) as source:
                parquet = open_parquet(source)
                names = wanted.find(parquet.schema_arrow, uri, "uri")
                parts += [(uri, file, group, names) for group in range(parquet.num_row_groups)]
        except (pa.ArrowException, OSError) as error:
            whole.bad.append(f"{Path(file).name}: cannot be read ({first_line(error)})")
    if not parts:
        yield 0, 0, whole
    with process_pool(processes) as pool:
        jobs = [pool.submit(_audit_row_group, *part) for part in parts]
        try:
            for done, job in enumerate(as_completed(jobs), start=1):
                whole.add(job.result())
                yield done, len(parts), whole
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _audit_row_group(uri: str, file: str, group: int, columns: tuple[str, str]) -> DatasetAudit:
    """Audit one row group of a file; ``columns`` are those of images and labels."""
    system, _ = resolve(split_glob(uri)[0], "uri")
    audit, name = DatasetAudit(), Path(file).name
    try:
        with system.open_input_file(file) as source:
            parquet = open_parquet(source)
            row = sum(parquet.metadata.row_group(before).num_rows for before in range(group))
            for batch in image_batches(parquet, group, *columns):
                images, labels = batch["image"], batch["label"]
                for image, label in zip(images, labels, strict=True):
                    audit._count(f"{name}, row {row}", image.as_py(), label.as_py())
                    row += 1
    except (pa.ArrowException, OSError, KeyError) as error:
        audit.bad.append(f"{name}, row group {group}: cannot be read ({first_line(error)})")
    audit.bad = audit.bad[:_MOST_BAD_ROWS]
    return audit
