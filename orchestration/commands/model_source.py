"""The MODEL of a command: a checkpoint folder, one of a hub or the registry, or a timm model by its name."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn

from pruners.errors import InputError, did_you_mean, first_line
from pruners.model.layers import PrunableLayer, find_layers
from trainers.checkpoint.folder import Checkpoint, load_checkpoint, open_verified, save_checkpoint
from trainers.config.data import ModelSettings
from trainers.models import factory
from trainers.sources.classes import check_known, names_of
from trainers.sources.columns import Columns
from trainers.sources.parquet import check_table
from trainers.storage import absolute

Patterns = Mapping[str, Sequence[str]]

_HUB = "hf-hub:"


def load(name: str, patterns: Patterns | None = None) -> Checkpoint:
    """Load a model with its weights; for the name of a timm model, the pretrained weights.

    Raises:
        InputError: it cannot be loaded; says why.
    """
    if is_file(name):
        with InputError.renamed(_as_typed, _PHRASES):
            return load_checkpoint(absolute(name), key="model", layers=patterns)
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # it logs a line for each retry
    try:
        return Checkpoint(factory.load_hub(name), None)
    except Exception as error:  # timm, the hub's client and their libraries raise errors of many kinds
        raise InputError("model", name, f"cannot be fetched ({first_line(error)})") from None


def check_named(name: str) -> None:
    """Check that a model is named at all: an empty name would be the current folder.

    Raises:
        InputError: it is empty.
    """
    if not name.strip():
        raise InputError("model", name, "is empty: name a checkpoint folder, hf-hub:NAME or a timm model")


@contextmanager
def resolved(name: str, tracking_uri: str | None, storage: str) -> Iterator[str]:
    """Fetch ``models:/NAME@alias`` as a local folder, in a ``with`` block; any other name stays as it is.

    Args:
        name: the MODEL of a command.
        tracking_uri: MLflow's; ``None``: that of the storage.
        storage: of the sweeps whose registry is meant.

    Returns:
        A context manager that gives the folder, or the name.

    Raises:
        InputError: a registry that does not answer, or does not hold it.
    """
    check_named(name)
    if not name.startswith("models:/"):
        yield name
        return
    from orchestration.commands.registry import registry_uri
    from orchestration.tracking import registry

    with registry_uri(tracking_uri, storage) as uri, registry.pulled(name, uri) as folder:
        yield str(folder)


@contextmanager
def as_checkpoint_folder(name: str) -> Iterator[tuple[Path, dict[str, Any]]]:
    """A folder (any pyarrow URI) or ``hf-hub:NAME`` as a local folder, checked, with its record.

    Raises:
        InputError: as :func:`load`.
    """
    if not name.startswith(_HUB):
        with open_verified(absolute(name), key="model") as folder_and_record:
            yield folder_and_record
        return
    with tempfile.TemporaryDirectory(prefix="espalier-") as folder:
        record = {"method": "dense", "sparsity": 0.0, "allocation": {}, "source": name}
        save_checkpoint(Path(folder), load(name).model, model_args={}, masks=None, record=record)
        yield Path(folder), record


def _as_typed(error: InputError) -> InputError:
    """Rename an error about layers to the option ``--layers``; other errors stay as they are."""
    first, _, module = error.key.partition(".")
    return error.replaced(key=f"--layers {module}".strip()) if first == "layers" else error


_PHRASES = {"give patterns of its own": "give patterns", "give patterns": "give --layers MODULE=REGEX"}


def skeleton(name: str) -> nn.Module:
    """A timm model by its name, on the meta device: shapes without weights."""
    known = timm.get_pretrained_cfg(name)
    classes = 1000 if known is None or known.num_classes is None else known.num_classes
    settings = ModelSettings(architecture=name).model_copy(update={"classes": classes})
    try:
        with torch.device("meta"):
            return factory.build_model(settings)
    except (
        InputError,
        NotImplementedError,
    ):  # the constructor computes with its weights, which the meta device lacks
        return factory.build_model(settings)


def is_architecture(name: str) -> bool:
    """Return whether timm knows a model of this name, and no folder has it.

    Raises:
        InputError: neither a place nor a name that timm knows.
    """
    check_named(name)
    if Path(absolute(name, "model")).exists() or any(sign in name for sign in "/:\\"):
        return False
    if not timm.is_model(name):
        close = did_you_mean(name, timm.list_models())
        raise InputError("model", name, f"no such folder, and no timm model{close}")
    return True


def is_file(name: str) -> bool:
    """Return whether a model is a folder, here or elsewhere, and not a model of the hub or of timm."""
    return not name.startswith(_HUB) and not is_architecture(name)


def layers_of(loaded: Checkpoint, patterns: Patterns | None = None) -> list[PrunableLayer]:
    """The prunable layers: by ``patterns``, by the patterns the model was pruned with, or by its family."""
    with InputError.renamed(_as_typed, _PHRASES):
        return find_layers(loaded.model, patterns or recorded_patterns(loaded))


def recorded_patterns(loaded: Checkpoint) -> Patterns | None:
    """The patterns of layers that a checkpoint was pruned with; ``None`` if there were none."""
    recorded = loaded.record.get("options") or dict(loaded.record.get("recipe") or {}).get("pruning") or {}
    patterns: Patterns | None = recorded.get("layers")
    return patterns


def check_images(uri: str, model: nn.Module, key: str, columns: Columns | None = None) -> str:
    """Check that a model can learn from a table, or be tested on it.

    Args:
        uri: Parquet file, folder or glob.
        model: the model.
        key: names the table in errors.
        columns: of the table, where its metadata does not say which are meant.

    Returns:
        The table's fingerprint.

    Raises:
        InputError: as :func:`trainers.sources.parquet.check_table`, a model that takes other images, or one
            that calls its classes otherwise.
    """
    classes, (channels, *_) = factory.classes(model), factory.input_size(model)
    if classes < 2 or channels != 3:
        shape = f"{classes} classes and {channels} channels"
        raise InputError(key, uri, f"holds RGB images with labels, and the model is for {shape}")
    fingerprint = check_table(uri, classes, key=key, columns=columns)
    names = names_of(uri, key=key, columns=columns, every=True)
    check_known(factory.label_names(model), names, key=key, uri=uri)
    return fingerprint


def device_for(name: str | None) -> str:
    """The requested device; default: a GPU if there is one.

    Raises:
        InputError: a GPU is requested, and there is none.
    """
    here = torch.cuda.is_available()
    if name == "cuda" and not here:
        raise InputError("--device", name, "no CUDA device is here; take cpu")
    return name or ("cuda" if here else "cpu")
