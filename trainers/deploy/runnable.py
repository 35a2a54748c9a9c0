"""Load the model of any folder, ready to run: a checkpoint by torch, a file for an engine by that engine."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from pruners.errors import InputError, first_line
from trainers.checkpoint.folder import fetched
from trainers.checkpoint.records import ExportRecord
from trainers.config.engines import Choice
from trainers.data.preprocessing import transform_settings
from trainers.deploy.checked import is_exported, read_record
from trainers.engines.registry import ANY_BATCH, Placement, check
from trainers.quantization import int8_folder
from trainers.quantization.int8_folder import Runnable


def load_runnable(uri: str, *, key: str) -> Runnable:
    """Load the model of a checkpoint folder, an INT8 folder, or a folder for an engine.

    Args:
        uri: the folder (any pyarrow URI), or ``hf-hub:NAME``.
        key: the option or recipe key that named it, for error messages.

    Returns:
        The model with how its images are prepared, its classes, its sparsity and its engine.

    Raises:
        InputError: a file that is missing, changed, or cannot be loaded; or an engine that cannot run here.
    """
    if not uri.startswith("hf-hub:"):
        with fetched(uri, key=key) as folder:
            if is_exported(folder):
                return _of_engine(folder, read_record(folder, uri, key=key), uri, key)
    return int8_folder.load_runnable(uri, key=key)


def _of_engine(folder: Path, record: ExportRecord, uri: str, key: str) -> Runnable:
    choice = Choice(record["engine"], record["type"])
    check(choice, "cpu", key=key)
    try:
        model = EngineModel(choice, folder / record["file"])
    except Exception as error:  # whatever an engine raises
        raise InputError(key, uri, f"{choice.engine} cannot load it ({first_line(error)})") from None
    about, source = record["preprocessing"], record.get("source", {})
    return Runnable(
        model,
        transform_settings(about),
        about["classes"],
        float(source.get("sparsity", 0.0)),
        choice.engine,
        about.get("labels", ()),
        choice.kind,
    )


class EngineModel(nn.Module):
    """A file, run by its engine on the CPU.

    Args:
        choice: the engine and its data type.
        path: the file or folder.
        threads: of the CPU; default: those of torch.
    """

    def __init__(self, choice: Choice, path: Path, threads: int | None = None) -> None:
        super().__init__()
        placement = Placement(threads or torch.get_num_threads())
        self._run = ANY_BATCH[choice.engine].load(path, choice.kind, placement)

    def forward(self, images: Tensor) -> Tensor:
        """Map images (N, 3, H, W) to logits (N, classes)."""
        return torch.from_numpy(np.ascontiguousarray(self._run(images.contiguous().numpy())))
