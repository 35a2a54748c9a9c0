"""``espalier export`` to a format that an engine reads: written, run by that engine, compared, then kept.

The folder OUT is one of :mod:`trainers.deploy.checked`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

import numpy as np
import torch
from torch import nn

from orchestration.commands.model_source import as_checkpoint_folder, check_images, resolved
from orchestration.commands.output import free_folder, whole_folder
from orchestration.common import defaults
from orchestration.export import sample_images
from orchestration.tracking.pyfunc_model import labels_beside
from pruners.errors import InputError
from trainers.checkpoint.folder import WEIGHTS, load_checkpoint, weights_hash
from trainers.data import datasets
from trainers.data.preprocessing import Images, preprocessing_of
from trainers.deploy.checked import BATCHES, EXPORT_RECORD, write_checked
from trainers.deploy.formats import FORMATS, Format, Source, check_packable
from trainers.models import factory
from trainers.quantization.checks import check_mode
from trainers.sources.columns import ColumnOptions, Columns

CALIBRATION = 256
_SEED = 0


@dataclass(frozen=True)
class ExportOptions(ColumnOptions):
    """Options of ``espalier export`` to a format that an engine reads."""

    checkpoint: str
    out: str
    kind: str
    data: str | None = None
    calibration: str | None = None
    tracking_uri: str | None = None
    storage: str = defaults.STORAGE

    @property
    def form(self) -> Format:
        return FORMATS[self.kind]


def export(options: ExportOptions, say: Callable[[str], None]) -> None:
    """Write the folder ``options.out``, whole and checked, or nothing.

    Raises:
        InputError: any error that can be found before anything is written.
        CheckError: the engine's answers differ from the model's; ``say`` has said by how much.
    """
    form = options.form
    form.check(options.kind, options.calibration)
    target = free_folder(options.out, "OUT")
    with (
        resolved(options.checkpoint, options.tracking_uri, options.storage) as location,
        as_checkpoint_folder(location) as (checkpoint, record),
    ):
        model = load_checkpoint(str(checkpoint), key="model").model.float().eval()
        if form.engine == "sparse":
            check_packable(model, "--format")
        if form.calibration == "possible" and options.calibration is None:
            check_mode(model, "dynamic", (), f"--format {options.kind} without --calibration")
        images, name = _real_images(model, options.data, options.columns)
        source = source_of(model, checkpoint, options.calibration, options.columns)
        origin = _provenance(location, checkpoint, record)
        with whole_folder(target, options.out, "OUT") as folder:
            write_checked(source, options.kind, folder, images, name, origin=origin, say=say)
    for line in _end(target, options):
        say(line)


def source_of(
    model: nn.Module, checkpoint: Path, calibration: str | None, columns: Columns | None = None
) -> Source:
    """Join a model with what its file must record, and with images for calibration, if they are given.

    Args:
        model: in float32 and eval mode.
        checkpoint: the folder that it was loaded from; class names may lie beside it.
        calibration: Parquet file, folder or glob of training images.
        columns: of that table, where its metadata does not say which are meant.

    Returns:
        What a format's ``write`` takes.

    Raises:
        InputError: images that the model cannot take.
    """
    source = Source(model, preprocessing_of(model, labels_beside(checkpoint)))
    if calibration is None:
        return source
    return Source(model, source.preprocessing, _calibration(model, calibration, columns))


def _real_images(model: nn.Module, uri: str | None, columns: Columns | None = None) -> tuple[Images, str]:
    """Images on which answers are compared, and their description for the record."""
    transform = datasets.eval_transform(factory.data_config(model))
    if uri is None:
        channels = factory.input_size(model)[0]
        if channels != 3:
            raise InputError(
                "model", None, f"takes images of {channels} channels, and only RGB can be checked"
            )
        return sample_images.as_input(max(BATCHES), transform), sample_images.NAME
    check_images(uri, model, "--data", columns)
    table = datasets.images(uri, transform, key="--data", columns=columns)
    count = max(BATCHES)
    rows = [table[row % len(table)][0] for row in range(count)]
    return torch.stack(rows).numpy(), f"the first of {PurePath(uri).name}"


def _calibration(model: nn.Module, uri: str, columns: Columns | None) -> Images:
    """A fixed part of the training images, drawn once."""
    check_images(uri, model, "--calibration", columns)
    transform = datasets.eval_transform(factory.data_config(model))
    table = datasets.images(uri, transform, key="--calibration", columns=columns)
    drawn = np.random.default_rng(_SEED).permutation(len(table))[:CALIBRATION]
    return torch.stack([table[int(row)][0] for row in drawn]).numpy()


def _provenance(location: str, checkpoint: Path, record: Mapping[str, Any]) -> dict[str, Any]:
    known = {key: record[key] for key in ("architecture", "method", "sparsity", "parent") if key in record}
    local = (checkpoint / WEIGHTS).exists() or not location.startswith("hf-hub:")
    return known | ({"weights": weights_hash(str(checkpoint))} if local else {"source": location})


def _end(target: Path, options: ExportOptions) -> Iterator[str]:
    size = sum(path.stat().st_size for path in target.iterdir() if path.name != EXPORT_RECORD)
    yield f"{'written to':<12}{options.out} ({size / 1e6:.2f} MB)"
    guide = "sparse_engine" if options.form.engine == "sparse" else "export"
    yield f"{'run it by':<12}the example for {options.kind} in docs/guides/{guide}.md"
