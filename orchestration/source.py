"""The MODEL of a command: a checkpoint folder, ``hf-hub:NAME``, or the name of a timm model."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import timm
import torch
from torch import nn

from pruners.errors import InputError, did_you_mean, first_line
from pruners.layers import PrunableLayer, find_layers
from trainers import models
from trainers.checkpoint import Checkpoint, load_checkpoint
from trainers.config import ModelSettings
from trainers.storage import absolute

Patterns = Mapping[str, Sequence[str]]

_HUB = "hf-hub:"


def load(name: str, patterns: Patterns | None = None) -> Checkpoint:
    """A model with its weights; those of a timm name are the pretrained ones.

    Raises:
        InputError: whatever keeps it from being loaded.
    """
    if not name.startswith(_HUB) and not is_architecture(name):
        with _by_option():
            return load_checkpoint(absolute(name), key="model", layers=patterns)
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # its retries, a line each
    try:
        return Checkpoint(models.load_hub(name), None)
    except Exception as error:  # timm, the hub's client and what they stand on have kinds of their own
        raise InputError("model", name, f"cannot be fetched ({first_line(error)})") from None


@contextmanager
def _by_option() -> Iterator[None]:
    """Errors about layers, in the words of the command line."""
    try:
        yield
    except InputError as error:
        first, _, module = error.key.partition(".")
        if first != "layers":
            raise
        expected = re.sub(r"give patterns(?: of its own)?", "give --layers MODULE=REGEX", error.expected)
        raise InputError(f"--layers {module}".strip(), error.value, expected) from None


def skeleton(name: str) -> nn.Module:
    """A timm model by its name, on the meta device: shapes without weights."""
    known = timm.get_pretrained_cfg(name)
    classes = 1000 if known is None or known.num_classes is None else known.num_classes
    settings = ModelSettings(architecture=name).model_copy(update={"classes": classes})
    try:
        with torch.device("meta"):
            return models.build_model(settings)
    except (InputError, NotImplementedError):  # a constructor that computes with its weights
        return models.build_model(settings)


def is_architecture(name: str) -> bool:
    """Whether timm knows a model of this name, and no folder has it.

    Raises:
        InputError: neither a place nor a name that timm knows.
    """
    if Path(name).expanduser().exists() or any(sign in name for sign in "/:\\"):
        return False
    if not timm.is_model(name):
        close = did_you_mean(name, timm.list_models())
        raise InputError("model", name, f"no such folder, and no timm model{close}")
    return True


def layers_of(loaded: Checkpoint, patterns: Patterns | None = None) -> list[PrunableLayer]:
    """The prunable layers: by ``patterns``, by those it was pruned with, or by its family."""
    recorded = loaded.record.get("options") or dict(loaded.record.get("recipe") or {}).get("pruning") or {}
    with _by_option():
        return find_layers(loaded.model, patterns or recorded.get("layers"))
