"""Every image of a Parquet file or folder decoded, labels counted, bad rows listed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from pruners.errors import first_line
from trainers.storage import resolve
from trainers.tables import decode, table_files

_NAMED = 1000  # bad rows of a part that are kept by name


@dataclass
class Survey:
    """What was found; sizes are (width, height)."""

    images: int = 0
    labels: Counter[int] = field(default_factory=Counter)
    smallest: tuple[int, int] | None = None
    largest: tuple[int, int] | None = None
    bad: list[str] = field(default_factory=list)

    def add(self, other: Survey) -> None:
        self.images += other.images
        self.labels += other.labels
        self.bad = sorted(self.bad + other.bad)
        for size in (other.smallest, other.largest):
            self._measure(size)

    def _measure(self, size: tuple[int, int] | None) -> None:
        if size is None:
            return
        area = size[0] * size[1]
        if self.smallest is None or area < self.smallest[0] * self.smallest[1]:
            self.smallest = size
        if self.largest is None or area > self.largest[0] * self.largest[1]:
            self.largest = size


def survey(uri: str, processes: int) -> Iterator[tuple[int, int, Survey]]:
    """Look at everything; gives (parts done, parts, what they hold) after each part.

    Raises:
        InputError: no such file or folder.
    """
    system, files = table_files(uri, "PATH")
    parts: list[tuple[str, str, int]] = []
    whole = Survey()
    for file in files:
        try:
            with system.open_input_file(file) as source:
                parts += [(uri, file, group) for group in range(pq.ParquetFile(source).num_row_groups)]
        except (pa.ArrowException, OSError) as error:
            whole.bad.append(f"{Path(file).name}: cannot be read ({first_line(error)})")
    if not parts:
        yield 0, 0, whole
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        jobs = [pool.submit(_look, *part) for part in parts]
        try:
            for done, job in enumerate(as_completed(jobs), start=1):
                whole.add(job.result())
                yield done, len(parts), whole
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _look(uri: str, file: str, group: int) -> Survey:
    """One row group of a file."""
    system, _ = resolve(uri, "PATH")
    found, name = Survey(), Path(file).name
    try:
        with system.open_input_file(file) as source:
            parquet = pq.ParquetFile(source)
            first = sum(parquet.metadata.row_group(before).num_rows for before in range(group))
            table = parquet.read_row_group(group, columns=["image", "label"])
            cells, labels = table["image"], table["label"].to_pylist()
    except (pa.ArrowException, OSError, KeyError) as error:
        return Survey(bad=[f"{name}, row group {group}: cannot be read ({first_line(error)})"])
    for row, label in enumerate(labels):
        found.images += 1
        try:
            found._measure(decode(cells[row].as_py()).size)
        except (OSError, TypeError, KeyError) as error:
            found.bad.append(f"{name}, row {first + row}: cannot be decoded ({first_line(error)})")
        if isinstance(label, int) and label >= 0:
            found.labels[label] += 1
        else:
            found.bad.append(f"{name}, row {first + row}: has the label {label}")
    found.bad = found.bad[:_NAMED]
    return found
