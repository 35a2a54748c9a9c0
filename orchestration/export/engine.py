"""``espalier export`` to a format that an engine reads: written, run by that engine, compared, then kept.

The folder OUT holds the engine's file and ``export.json`` (:data:`EXPORT_RECORD`): where it came from, how it
was checked, its versions and checksums, and the checked file's answers to a few made-up pictures, by which
anybody can tell later and elsewhere whether an engine still answers so.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from orchestration.commands.model_source import as_checkpoint_folder, check_images, resolved
from orchestration.commands.output import free_folder, whole_folder
from orchestration.common import defaults
from orchestration.export import sample_images
from orchestration.export.formats import FORMATS, Format, Source
from orchestration.tracking.pyfunc_model import labels_beside
from pruners.errors import InputError, first_line
from trainers.checkpoint.checksums import as_json, read_verified, sums
from trainers.checkpoint.folder import WEIGHTS, load_checkpoint, versions, weights_hash
from trainers.checkpoint.records import ExportRecord
from trainers.data import datasets
from trainers.data.preprocessing import PROBES, Images, pattern_images, preprocessing_of
from trainers.engines.agreement import TOLERANCE, Agreement
from trainers.engines.registry import ANY_BATCH, Placement, Run
from trainers.models import factory
from trainers.optional_imports import installed
from trainers.quantization.checks import check_mode, share_of
from trainers.sources.columns import ColumnOptions, Columns

EXPORT_RECORD = "export.json"
FORMAT = "espalier-export-1"
BATCHES = (1, 2, 7, 64)
"""Sizes of the batches that a file has to answer before it is kept."""
CALIBRATION = 256
_SEED = 0


class CheckError(RuntimeError):
    """A file whose engine does not answer what the model answers."""


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
        InputError: whatever can be known to fail before anything is written.
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
        if form.kind == "int8" and options.calibration is None:
            check_mode(model, "dynamic", (), "--format onnx-int8 without --calibration")
        images, name = _real_images(model, options.data, options.columns)
        source = source_of(model, checkpoint, options.calibration, options.columns)
        with whole_folder(target, options.out, "OUT") as folder:
            form.write(source, folder)
            run = _loaded(form, folder)
            check = _check(run, form, model, images)
            say(f"{'compared':<12}with torch, on {len(images)} images ({name})")
            for batch, agreement in check.items():
                say(f"{f'batch {batch}':<12}{agreement}")
            worst = max(check.values(), key=lambda agreement: agreement.relative)
            if not worst.holds(form.kind):
                raise CheckError(
                    f"{options.kind}: {form.engine} does not answer what the model answers (relative "
                    f"difference {worst.relative:.2g}, and {form.kind} allows {TOLERANCE[form.kind]:g}); "
                    "nothing is kept"
                )
            content = _content(options, source, {"images": name, "tolerance": TOLERANCE[form.kind]}, check)
            if form.int8_values is not None:
                content["int8_share"] = share_of(form.int8_values(folder), model)
                say(f"{'int8':<12}{100 * content['int8_share']:.1f} % of the weights")
            content["probe"] = {"images": PROBES, "logits": run(_probes(source)).tolist()}
            content["source"] = _provenance(location, checkpoint, record)
            content["files"] = sums(folder, sorted(path.name for path in folder.iterdir()))
            (folder / EXPORT_RECORD).write_text(as_json(content), encoding="utf-8")
            for path in folder.iterdir():
                path.chmod(0o644)  # some libraries make files that only their owner can read
    for line in _end(target, options):
        say(line)


def source_of(
    model: nn.Module, checkpoint: Path, calibration: str | None, columns: Columns | None = None
) -> Source:
    """A model with what its file shall say, and with images for calibration, if they are given.

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


def torch_answers(model: nn.Module, images: Images) -> NDArray[np.float32]:
    """Logits of a float32 model in eval mode, (N, classes)."""
    with torch.inference_mode():
        logits: NDArray[np.float32] = model(torch.from_numpy(images)).numpy()
    return logits


def read_record(folder: Path, name: str) -> ExportRecord:
    """The record of a folder that :func:`export` wrote, after checking its files.

    Raises:
        InputError: it is none, or a file is missing or not what the record says.
    """
    content = read_verified(
        folder,
        EXPORT_RECORD,
        name,
        key="model",
        writer="espalier export",
        fits=lambda content: content["kind"] in FORMATS,
    )
    return cast(ExportRecord, content)


def _real_images(model: nn.Module, uri: str | None, columns: Columns | None = None) -> tuple[Images, str]:
    """Images to compare answers on, and what they are."""
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


def _loaded(form: Format, folder: Path) -> Run:
    try:
        return ANY_BATCH[form.engine].load(folder / form.file, form.kind, Placement(torch.get_num_threads()))
    except Exception as error:  # whatever an engine raises
        raise CheckError(
            f"{form.engine} cannot load the file ({first_line(error)}); nothing is kept"
        ) from None


def _probes(source: Source) -> Images:
    """Made-up pictures; the checked file's answers to them are recorded, for checks later and elsewhere.

    The file's answers and not torch's: the pictures may lie outside of what INT8 was calibrated for.
    """
    return pattern_images(source.preprocessing, PROBES)


def _check(run: Run, form: Format, model: nn.Module, images: Images) -> dict[int, Agreement]:
    """The engine's answers to the first images, batch by batch, against torch's."""
    expected = torch_answers(model, images)
    try:
        return {size: Agreement.of(run(images[:size].copy()), expected[:size]) for size in BATCHES}
    except Exception as error:  # whatever an engine raises
        raise CheckError(
            f"{form.engine} cannot run the file ({first_line(error)}); nothing is kept"
        ) from None


def _provenance(location: str, checkpoint: Path, record: Mapping[str, Any]) -> dict[str, Any]:
    known = {key: record[key] for key in ("architecture", "method", "sparsity", "parent") if key in record}
    local = (checkpoint / WEIGHTS).exists() or not location.startswith("hf-hub:")
    return known | ({"weights": weights_hash(str(checkpoint))} if local else {"source": location})


def _content(
    options: ExportOptions, source: Source, by: dict[str, Any], check: Mapping[int, Agreement]
) -> ExportRecord:
    form = options.form
    return {
        "format": FORMAT,
        "kind": options.kind,
        "engine": form.engine,
        "type": form.kind,
        "file": form.file,
        "calibration": None if source.calibration is None else len(source.calibration),
        "preprocessing": dict(source.preprocessing),
        "check": by | {"batches": {str(size): agreement.as_dict() for size, agreement in check.items()}},
        "versions": versions() | installed(*form.packages),
    }


def _end(target: Path, options: ExportOptions) -> Iterator[str]:
    size = sum(path.stat().st_size for path in target.iterdir() if path.name != EXPORT_RECORD)
    yield f"{'written to':<12}{options.out} ({size / 1e6:.2f} MB)"
    yield f"{'run it by':<12}the example for {options.kind} in docs/guides/export.md"
