"""A sweep's images as data sets of MLflow: name, number of rows, source."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import TYPE_CHECKING

from orchestration.common.redaction import redact
from trainers import storage
from trainers.config.data import DataSettings
from trainers.sources.files import split_glob
from trainers.sources.parquet import count_rows

if TYPE_CHECKING:
    from mlflow.entities import DatasetInput

_PARTS = ("train", "validation", "test")


@dataclass(frozen=True)
class Dataset:
    """One part of the images; ``digest`` is of the data as a whole, as in checkpoints and versions."""

    name: str
    digest: str
    source: str
    rows: int
    context: str

    @property
    def source_type(self) -> str:
        """MLflow's name for the kind of a source: ``s3``, ``gs`` …; ``local`` for files on this machine."""
        scheme, separator, _ = self.source.partition("://")
        return scheme if separator else "local"

    def as_input(self) -> DatasetInput:
        """The data set in MLflow's types, as an input of a run."""
        from mlflow import entities

        dataset = entities.Dataset(
            name=self.name,
            digest=self.digest,
            source_type=self.source_type,
            source=json.dumps({"uri": self.source}),
            profile=json.dumps({"num_rows": self.rows}),
        )
        return entities.DatasetInput(dataset, [entities.InputTag("mlflow.data.context", self.context)])


def datasets(data: DataSettings, data_hash: str, name: str | None = None) -> list[Dataset]:
    """Describe the parts of the images that a sweep reads; held-out validation images count as train.

    Args:
        data: the recipe's data.
        data_hash: hash of all parts.
        name: of the data, if it has one.

    Returns:
        A data set for each part.
    """
    return list(_datasets(data, data_hash[:12], name))


def _datasets(data: DataSettings, digest: str, known: str | None) -> Iterator[Dataset]:
    for part in _PARTS:
        uri: str | None = getattr(data, part)
        if uri is None:
            continue
        stem = known or _stem(uri)
        name = part if stem == part else f"{stem}-{part}"  # MLflow identifies data sets by name and digest
        yield Dataset(name, digest, redact(storage.absolute(uri)), count_rows(uri, key=f"data.{part}"), part)


def _stem(uri: str) -> str:
    """The name of a file, a folder or a glob: ``train`` for ``train-*.parquet``."""
    base, pattern = split_glob(uri)
    return PurePosixPath(base).stem if pattern is None else re.split(r"[-_.]*[*?\[]", pattern)[0] or base
