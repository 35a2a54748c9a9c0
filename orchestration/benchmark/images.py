"""The images of a benchmark: real ones to compare answers on, and labelled ones to measure accuracy on."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from orchestration.benchmark.models import Variant
from orchestration.export import sample_images
from pruners.arithmetic import ceil_div
from pruners.errors import InputError
from trainers.data import datasets
from trainers.data.arrow_store import Store
from trainers.data.preprocessing import Images, transform_settings
from trainers.sources.classes import check_known, names_of
from trainers.sources.columns import Columns
from trainers.sources.parquet import check_table

COMPARED = 64
_CHUNK = 256


def comparison_images(variant: Variant, uri: str | None, columns: Columns | None = None) -> Images:
    """The first test images, or photographs, as a model takes them.

    Args:
        variant: the model.
        uri: of the test images; ``None``: photographs.
        columns: of that table, where its metadata does not say which are meant.

    Returns:
        (:data:`COMPARED`, 3, height, width), normalised.

    Raises:
        InputError: a model that takes no RGB images.
    """
    channels = variant.preprocessing["input_size"][0]
    if channels != 3:
        raise InputError(
            "model", variant.name, f"takes images of {channels} channels; RGB alone can be compared"
        )
    if uri is None:
        return sample_images.as_input(COMPARED, _transform(variant))
    return _pixels(datasets.images(uri, _transform(variant), key="--data", columns=columns), range(COMPARED))


@dataclass(frozen=True)
class Tests:
    """Labelled images of a Parquet file or folder."""

    uri: str
    labels: NDArray[np.int64]
    columns: Columns | None = None

    @classmethod
    def of(cls, variant: Variant, uri: str, most: int | None, columns: Columns | None = None) -> Tests:
        """Check a table of labelled images against a model, and read its labels.

        Args:
            variant: the model.
            uri: Parquet file, folder or glob.
            most: so many of the first images; default all.
            columns: names of its columns, if its metadata does not say them.

        Returns:
            The images of the table.

        Raises:
            InputError: a table that cannot be used, or with labels that the model has no class for.
        """
        about = variant.preprocessing
        check_table(uri, about["classes"], key="--data", columns=columns)
        names = names_of(uri, key="--data", columns=columns, every=True)
        check_known(about.get("labels", ()), names, key="--data", uri=uri)
        labels = np.asarray(Store.open(uri, key="--data", columns=columns).labels, np.int64)
        return cls(uri, labels[:most], columns)

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def parts(self) -> int:
        return ceil_div(len(self), _CHUNK)

    def chunks(self, variants: Sequence[Variant]) -> Iterator[tuple[NDArray[np.int64], dict[str, Images]]]:
        """Labels, and the images of each variant by its name, part by part."""
        alike = {variant.name: json.dumps(transform_settings(variant.preprocessing)) for variant in variants}
        one_of_each = {settings: name for name, settings in alike.items()}
        by_name = {variant.name: variant for variant in variants}
        tables = {
            settings: datasets.images(self.uri, _transform(by_name[name]), key="--data", columns=self.columns)
            for settings, name in one_of_each.items()
        }
        for begin in range(0, len(self), _CHUNK):
            rows = range(begin, min(begin + _CHUNK, len(self)))
            seen = {settings: _pixels(table, rows) for settings, table in tables.items()}
            yield self.labels[rows.start : rows.stop], {name: seen[key] for name, key in alike.items()}


def _transform(variant: Variant) -> datasets.Transform:
    return datasets.eval_transform(transform_settings(variant.preprocessing))


def _pixels(table: datasets.ImageTable, rows: range) -> Images:
    """Images of some rows; after the last row of a short table the first one follows again."""
    pixels: Images = torch.stack([table[row % len(table)][0] for row in rows]).numpy()
    return pixels
