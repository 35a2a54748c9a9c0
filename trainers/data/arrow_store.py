"""A local cache of images: Parquet files as one memory-mapped Arrow file, shared by all processes of a node.

To read one row of a Parquet file, its whole row group must be decoded, so reading in a shuffled order would
decode everything many times. Rows of an Arrow file on the local disk are read one by one, and the system can
take back the memory of its pages. Each node writes the file once, under ``$ESPALIER_CACHE`` (default
``~/.cache/espalier``), named by a hash of the Parquet files' names, sizes and times.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from filelock import FileLock
from pyarrow import fs

from pruners.errors import InputError, first_line
from trainers.cache_folder import cache_folder
from trainers.sources.columns import Columns
from trainers.sources.files import table_files
from trainers.sources.parquet import image_batches, open_parquet

_FORMAT = 1


class Store:
    """Encoded images with their labels, by row; a pickled copy opens the same file in another process.

    Attributes:
        uri: the Parquet files, as the recipe names them.
        labels: of all rows, int64, shape (N,); rows without a label are not in the store.
        left_out: a line for each row or file that was skipped (``tolerant`` only).
    """

    def __init__(self, path: Path, uri: str) -> None:
        self.uri = uri
        self._path = path
        self._open()

    @classmethod
    def open(
        cls, uri: str, *, key: str = "data", tolerant: bool = False, columns: Columns | None = None
    ) -> Store:
        """Open the store of a Parquet file, folder or glob; write it first if this machine has none.

        Args:
            uri: the Parquet file, folder or glob.
            key: the recipe key that named it, for error messages.
            tolerant: leave out files that cannot be read, and rows without a label.
            columns: the columns that the user named.

        Returns:
            The store of all rows, in the order of the files' names.

        Raises:
            InputError: missing files, or (unless tolerant) a file or row that cannot be used, by name.
        """
        source = _Source(uri, key, tolerant, columns or Columns(), *table_files(uri, key))
        path = cache_folder() / f"{source.fingerprint()}.arrow"
        if not path.exists():
            _write(path, source)
        return cls(path, uri)

    def _open(self) -> None:
        with pa.memory_map(str(self._path)) as source:
            table = pa.ipc.open_file(source).read_all()
        facts = json.loads(_facts_of(self._path).read_text())
        self.left_out: list[str] = facts["left_out"]
        self._files: list[tuple[str, int]] = facts["files"]
        cells = table["image"]
        # stores of earlier versions hold cells {bytes, path}, of which only the bytes are needed
        self._chunks = (
            cells if not pa.types.is_struct(cells.type) else pc.struct_field(cells, "bytes")
        ).chunks
        self._ends = np.cumsum([len(chunk) for chunk in self._chunks])
        self.labels = table["label"].to_numpy()
        self._rows = table["row"]

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def name(self) -> str:
        """Name of the store's file: the hash of its source files."""
        return self._path.stem

    def cell(self, row: int) -> Any:
        """The encoded image of a row: bytes, or ``None`` where the table has none."""
        chunk = int(np.searchsorted(self._ends, row, side="right"))
        return self._chunks[chunk][row - int(self._ends[chunk]) + len(self._chunks[chunk])].as_py()

    def where(self, row: int) -> str:
        """The Parquet file and its row that a row of the store comes from, as text.

        Raises:
            IndexError: there is no such row.
        """
        before = 0
        for name, count in self._files:
            if row < before + count:
                return f"{name}, row {self._rows[row].as_py()}"
            before += count
        raise IndexError(row)

    def __getstate__(self) -> tuple[Path, str]:
        return self._path, self.uri

    def __setstate__(self, state: tuple[Path, str]) -> None:
        self._path, self.uri = state
        self._open()


@dataclass(frozen=True)
class _Source:
    """The Parquet files from which a store is made."""

    uri: str
    key: str
    tolerant: bool
    columns: Columns
    system: fs.FileSystem
    files: list[str]

    def fingerprint(self) -> str:
        infos = self.system.get_file_info(self.files)
        facts = [(self.system.type_name, info.path, info.size, info.mtime_ns) for info in infos]
        named = [[self.columns.image, self.columns.label]] if self.columns.named else []
        content = json.dumps([_FORMAT, self.tolerant, facts, *named], sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()[:24]

    def refused(self, expected: str) -> InputError:
        return InputError(self.key, self.uri, expected)


def _write(path: Path, source: _Source) -> None:
    """Write the Arrow file under a temporary name, and rename it when it is complete."""
    partial = path.with_suffix(".partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{path}.lock"):
            if path.exists():  # another process of this machine was first
                return
            try:
                facts = _copy(partial, source)
                _facts_of(path).write_text(json.dumps(facts))
                partial.replace(path)
            finally:
                partial.unlink(missing_ok=True)
    except OSError as error:
        raise source.refused(f"cannot be copied to {path.parent} ({first_line(error)})") from None


def _facts_of(path: Path) -> Path:
    return path.with_suffix(".json")


def _copy(partial: Path, source: _Source) -> dict[str, list[Any]]:
    """Copy the rows of all files, batch by batch; returns the content of the store's JSON file."""
    left_out: list[str] = []
    counts: list[tuple[str, int]] = []
    with pa.OSFile(str(partial), "wb") as sink:
        writer: pa.RecordBatchFileWriter | None = None
        for file in source.files:
            name, count = Path(file).name, 0
            for batch in _batches(file, source, left_out):
                missing = batch["row"].filter(batch["label"].is_null()).to_pylist()
                if missing and not source.tolerant:
                    raise source.refused(f"{name}, row {missing[0]} has no label")
                left_out += [f"{name}, row {row}: no label" for row in missing]
                rows = batch.filter(batch["label"].is_valid()).combine_chunks()
                writer = writer or pa.ipc.new_file(sink, rows.schema)
                writer.write_table(rows)
                count += len(rows)
            counts.append((name, count))
        if writer is None:
            raise source.refused(f"holds no image that can be read ({'; '.join(left_out[:1])})")
        writer.close()
    return {"left_out": left_out, "files": counts}


def _batches(file: str, source: _Source, left_out: list[str]) -> Iterator[pa.Table]:
    """Tables of some hundred rows with the columns image, label and row; unreadable files are noted."""
    name = Path(file).name
    with _refusing(source, name, left_out), source.system.open_input_file(file) as stream:
        parquet = open_parquet(stream)
        image, label = source.columns.find(parquet.schema_arrow, source.uri, source.key)
        first = 0
        for group in range(parquet.num_row_groups):
            count = parquet.metadata.row_group(group).num_rows
            with _refusing(source, f"{name}, rows {first} to {first + count - 1}", left_out):
                row = first
                for batch in image_batches(parquet, group, image, label):
                    rows = pa.array(range(row, row + len(batch)), pa.int64())
                    row += len(batch)
                    labels = batch["label"].cast(pa.int64())
                    yield pa.table({"image": batch["image"], "label": labels, "row": rows})
            first += count


@contextmanager
def _refusing(source: _Source, what: str, left_out: list[str]) -> Iterator[None]:
    """Turn errors of reading into an :class:`InputError`; if the source is tolerant, note them instead."""
    try:
        yield
    except (pa.ArrowException, OSError, KeyError) as error:
        reason = f"{what} cannot be read ({first_line(error)})"
        if not source.tolerant:
            raise source.refused(reason) from None
        left_out.append(reason)
