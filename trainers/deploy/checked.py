"""A file for an engine: written, run by that engine, compared with torch, and recorded.

Its folder holds the engine's file and ``export.json`` (:data:`EXPORT_RECORD`): where it came from, how it
was checked, its versions and checksums, and the checked file's outputs for a few synthetic images, by which
anybody can see later and elsewhere whether an engine still gives the same.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from pruners.errors import first_line
from trainers.checkpoint.checksums import read_verified, sums
from trainers.checkpoint.folder import versions
from trainers.checkpoint.records import ExportRecord
from trainers.data.preprocessing import PROBES, Images, pattern_images
from trainers.deploy.formats import FORMATS, Format, Source
from trainers.engines.agreement import Agreement, tolerance_of
from trainers.engines.registry import ANY_BATCH, Placement, Run
from trainers.optional_imports import installed
from trainers.quantization.checks import share_of
from trainers.storage import as_json

EXPORT_RECORD = "export.json"
FORMAT = "espalier-export-1"
BATCHES = (1, 2, 7, 64)
"""Sizes of the batches on which a file is run and compared before it is kept."""


class CheckError(RuntimeError):
    """The outputs of a file's engine differ from the model's by more than is allowed."""


def write_checked(
    source: Source,
    kind: str,
    folder: Path,
    images: Images,
    images_name: str,
    *,
    origin: Mapping[str, Any],
    say: Callable[[str], None] = lambda line: None,
) -> ExportRecord:
    """Fill a folder with a model's file for an engine, and check it.

    Args:
        source: the model, in float32 and eval mode, and what its file must record.
        kind: name of the format.
        folder: it exists and is empty.
        images: real ones, (:data:`BATCHES`' largest, channels, height, width), normalised.
        images_name: what they are, for the record.
        origin: where the model comes from, for the record.
        say: is given lines about how far the outputs lie apart.

    Returns:
        The record, as it was written beside the file.

    Raises:
        InputError: a model that the format cannot hold.
        CheckError: the engine's outputs differ from the model's; ``say`` was given by how much.
    """
    form = FORMATS[kind]
    form.write(source, folder)
    run = _loaded(form, folder)
    check = _check(run, form, source.model, images)
    say(f"{'compared':<12}with torch, on {len(images)} images ({images_name})")
    for batch, agreement in check.items():
        say(f"{f'batch {batch}':<12}{agreement}")
    worst = max(check.values(), key=lambda agreement: agreement.relative)
    tolerance = tolerance_of(form.engine, form.kind)
    if not worst.relative <= tolerance:
        raise CheckError(
            f"{kind}: {form.engine} does not answer what the model answers (relative "
            f"difference {worst.relative:.2g}, and {form.kind} allows {tolerance:g}); "
            "nothing is kept"
        )
    content: ExportRecord = {
        "format": FORMAT,
        "kind": kind,
        "engine": form.engine,
        "type": form.kind,
        "file": form.file,
        "calibration": None if source.calibration is None else len(source.calibration),
        "preprocessing": source.preprocessing,
        "check": {
            "images": images_name,
            "tolerance": tolerance,
            "batches": {str(size): agreement.as_dict() for size, agreement in check.items()},
        },
        "versions": versions() | installed(*form.packages),
        "source": dict(origin),
    }
    if form.int8_values is not None:
        content["int8_share"] = share_of(form.int8_values(folder), source.model)
        say(f"{'int8':<12}{100 * content['int8_share']:.1f} % of the weights")
    for heading, text in form.remarks(folder):
        say(f"{heading:<12}{text}")
    # the file's answers, not torch's: the synthetic images may exceed the ranges that INT8 was calibrated for
    probe = run(pattern_images(source.preprocessing, PROBES))
    content["probe"] = {"images": PROBES, "logits": probe.tolist()}
    content["files"] = sums(folder, sorted(path.name for path in folder.iterdir()))
    (folder / EXPORT_RECORD).write_text(as_json(content), encoding="utf-8")
    for path in folder.iterdir():
        path.chmod(0o644)  # some libraries make files that only their owner can read
    return content


def read_record(folder: Path, name: str, *, key: str = "model") -> ExportRecord:
    """The record of a folder that :func:`write_checked` filled, after checking its files.

    Args:
        folder: the local folder.
        name: the folder as the user named it, for error messages.
        key: the option or recipe key that named it, for error messages.

    Returns:
        The record.

    Raises:
        InputError: it is no such folder, or a file is missing or has changed.
    """
    content = read_verified(
        folder,
        EXPORT_RECORD,
        name,
        key=key,
        writer="espalier export",
        fits=lambda content: content["kind"] in FORMATS,
    )
    return cast(ExportRecord, content)


def is_exported(folder: Path) -> bool:
    """Return whether a folder was written for an engine."""
    return (folder / EXPORT_RECORD).is_file()


def torch_answers(model: nn.Module, images: Images) -> NDArray[np.float32]:
    """Compute the logits of a float32 model in eval mode.

    Args:
        model: on the CPU.
        images: (N, channels, height, width), normalised.

    Returns:
        (N, classes), float32.
    """
    with torch.inference_mode():
        logits: NDArray[np.float32] = model(torch.from_numpy(images)).numpy()
    return logits


def _loaded(form: Format, folder: Path) -> Run:
    try:
        return ANY_BATCH[form.engine].load(folder / form.file, form.kind, Placement(torch.get_num_threads()))
    except Exception as error:  # whatever an engine raises
        raise CheckError(
            f"{form.engine} cannot load the file ({first_line(error)}); nothing is kept"
        ) from None


def _check(run: Run, form: Format, model: nn.Module, images: Images) -> dict[int, Agreement]:
    """Compare the engine's answers to the first images, for each size of batch, with torch's."""
    expected = torch_answers(model, images)
    try:
        return {size: Agreement.of(run(images[:size].copy()), expected[:size]) for size in BATCHES}
    except Exception as error:  # whatever an engine raises
        raise CheckError(
            f"{form.engine} cannot run the file ({first_line(error)}); nothing is kept"
        ) from None
