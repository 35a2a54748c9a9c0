"""Weights in a file of their own, as training scripts leave them: timm's, the original Swin's and DeiT's,
Lightning's, torch's. Read without running any code of theirs, and loaded as timm loads its own."""

from __future__ import annotations

import argparse
import pickle
import re
import shutil
import tempfile
from collections import Counter, OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from pyarrow import fs
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from pruners.errors import InputError, did_you_mean, first_line
from trainers.config.data import DataSettings, ModelSettings
from trainers.models import factory
from trainers.models.transformers_names import is_of_transformers
from trainers.storage import resolve

_AVERAGES = ("state_dict_ema", "model_ema", "ema_state_dict", "model_ema_state_dict", "ema")
_WEIGHTS = ("state_dict", "model", "model_state_dict", "net", "network", "weights")
_IS_AVERAGE = re.compile(r"(?:^|[._])ema(?:[._]|$)", re.IGNORECASE)
_DEPTH = 4  # of module._orig_mod.model. and the like
_NEARLY = 0.5  # of the weights: an average need not hold what is no parameter
_RESAMPLED = re.compile(r"pos_embed|relative_position_bias_table")
_SHOWN = 240
_PREPROCESSING = ("mean", "std", "crop_pct", "interpolation")


class _Settings:
    """In place of yacs' CfgNode, in which the original Swin keeps its settings.

    What is made is a mapping of a kind that torch fills when it reads weights only.
    """

    def __new__(cls) -> Any:
        return OrderedDict()


_SCALAR: Any = np.float64(0).__reduce__()[0]
# What else stands beside the weights in files of training scripts; none of it runs code when it is read.
_HARMLESS: list[Any] = [
    argparse.Namespace,
    (_Settings, "yacs.config.CfgNode"),
    _SCALAR,
    (_SCALAR, "numpy.core.multiarray.scalar"),  # as numpy 1 called it
    np.dtype,
    *(type(np.dtype(kind)) for kind in (np.float32, np.float64, np.int64)),
]


@dataclass(frozen=True)
class WeightsFile:
    """What was read: tensors by the file's own names, and what it says of their model.

    Attributes:
        chosen: which of several sets of weights (``state_dict_ema``); empty where there is one.
        settings: of the training, as timm's ``train.py`` keeps them.
    """

    tensors: dict[str, Tensor]
    chosen: str
    architecture: str | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)


def load_weights(
    uri: str,
    architecture: str | None = None,
    arguments: Mapping[str, Any] | None = None,
    *,
    classes: int | None = None,
    data: DataSettings | None = None,
    average: bool = True,
    key: str = "model.checkpoint",
) -> tuple[nn.Module, str]:
    """A timm model with the weights of a file (any pyarrow URI), and which of the file's these are.

    Args:
        architecture: default: what the file says, as those of timm's ``train.py`` do.
        arguments: for timm's model.
        classes: another number than the weights know brings a new classifier; default: theirs.
        data: sets the normalisation that travels with the model.
        average: a moving average goes before the weights themselves.

    Raises:
        InputError: no such file, or one that cannot be read or does not fit.
    """
    with _local_file(uri, key) as path:
        found = read_weights(path, uri, key=key, average=average)
    name = architecture or found.architecture
    if name is None:
        advice = (
            "give model.architecture, or make a folder of it by 'espalier import FILE --architecture NAME'"
        )
        raise InputError(key, uri, f"does not say of which timm model its weights are: {advice}")
    if not timm.is_model(name):
        raise InputError("model.architecture", name, f"no timm model{did_you_mean(name, timm.list_models())}")
    overlay, given = _described(name, found.settings)
    given |= arguments or {}
    overlay |= factory.normalisation(data)
    tensors, chosen = _of_model(found, name, given, uri, key, average=average)
    there = _classes(name, tensors)
    overlay |= {"source": "", "state_dict": tensors, "num_classes": there, "label_offset": 0}
    try:
        model: nn.Module = timm.create_model(
            name, pretrained=True, num_classes=there, pretrained_cfg_overlay=overlay, **given
        )
    except (RuntimeError, KeyError, ValueError, TypeError, AssertionError, AttributeError) as error:
        raise InputError(key, uri, f"does not fit {name} ({_reason(error, tensors)})") from None
    config: Any = model.pretrained_cfg
    config.pop("state_dict", None)  # they are the model's now
    factory.as_built(model, given.get("img_size"), given.get("in_chans"))
    if "img_size" not in given:
        _refuse_resampled(model, tensors, uri, key)
    if classes is not None and classes != there:
        factory.replace_head(model, classes)
    return model, chosen


def from_file(settings: ModelSettings, data: DataSettings | None = None) -> nn.Module:
    """The model of a recipe that starts from a file of weights.

    Raises:
        InputError: as :func:`load_weights`.
    """
    assert settings.checkpoint is not None, "only a model with a checkpoint has weights to load"
    given = settings.architecture, settings.args
    return load_weights(settings.checkpoint, *given, classes=settings.classes, data=data)[0]


def read_weights(path: Path, uri: str, *, key: str, average: bool = True) -> WeightsFile:
    """The tensors of a file, and what it says of them.

    Args:
        average: a moving average goes before the weights themselves.

    Raises:
        InputError: no file of weights, or one with objects whose reading could run code.
    """
    content = _content(path, uri, key)
    names = (*(_AVERAGES if average else ()), *_WEIGHTS)
    chosen = next((name for name in names if _tensors(content.get(name))), "")
    tensors = _tensors(content.get(chosen) if chosen else content)
    if not tensors:
        there = ", ".join(map(str, list(content)[:8])) or "nothing"
        raise InputError(key, uri, f"holds no weights by a known name; it has {there}")
    said = content.get("args")
    settings = vars(said) if isinstance(said, argparse.Namespace) else said
    architecture = content.get("arch")
    known = isinstance(architecture, str) and timm.is_model(architecture)
    return WeightsFile(
        tensors,
        chosen,
        architecture if known else None,
        settings if known and isinstance(settings, Mapping) else {},
    )


def _content(path: Path, uri: str, key: str) -> Mapping[str, Any]:
    try:
        if path.suffix.lower() == ".safetensors":
            return load_file(path)
        with torch.serialization.safe_globals(_HARMLESS):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise InputError(key, uri, f"{_unsafe(path)}; save its state_dict() alone by torch.save") from None
    except (SafetensorError, RuntimeError, OSError, EOFError, ValueError, KeyError, TypeError) as error:
        raise InputError(key, uri, f"is damaged, or no file of weights ({first_line(error)})") from None
    if not isinstance(content, Mapping):
        raise InputError(key, uri, f"holds a {type(content).__name__}, and no weights by their names")
    return content


def _unsafe(path: Path) -> str:
    try:
        with torch.serialization.safe_globals(_HARMLESS):
            names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except Exception:  # whatever the file is
        return "is no file of torch.save"
    if not names:
        return "is damaged, or no file of torch.save"
    return f"holds objects whose reading could run code, and is not read ({', '.join(names[:4])})"


def _tensors(value: Any) -> dict[str, Tensor]:
    if not isinstance(value, Mapping):
        return {}
    return {name: one for name, one in value.items() if isinstance(one, Tensor) and isinstance(name, str)}


def _described(name: str, settings: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Preprocessing and arguments of the model that timm's ``train.py`` was started with."""
    overlay = {key: settings[key] for key in _PREPROCESSING if settings.get(key) is not None}
    overlay |= {key: tuple(overlay[key]) for key in ("mean", "std") if key in overlay}
    arguments: dict[str, Any] = {}
    size = settings.get("input_size") or settings.get("img_size")
    if size is not None:
        sides = (size, size) if isinstance(size, int) else tuple(size[-2:])
        known = timm.get_pretrained_cfg(name)
        if known is not None:
            overlay["input_size"] = (known.input_size[0], *sides)
            if known.fixed_input_size and sides != tuple(known.input_size[1:]):
                arguments["img_size"] = sides
    if isinstance(more := settings.get("model_kwargs"), Mapping):
        arguments |= more
    return overlay, arguments


def _of_model(
    found: WeightsFile, name: str, arguments: Mapping[str, Any], uri: str, key: str, *, average: bool
) -> tuple[dict[str, Tensor], str]:
    """The tensors under the names that timm knows: without ``module.``, ``_orig_mod.``, ``model.`` …"""
    try:
        with torch.device("meta"):
            model = timm.create_model(name, **arguments)
    except (NotImplementedError, RuntimeError):  # a constructor that computes with its weights
        model = timm.create_model(name, **arguments)
    except (TypeError, ValueError, AssertionError) as error:
        raise InputError(
            "model.args", dict(arguments), f"{name} refuses them ({first_line(error)})"
        ) from None
    names, top = set(model.state_dict()), {child for child, _ in model.named_children()}
    whole, parts = Counter[str](), Counter[str]()
    for tensor in found.tensors:
        path = tensor.split(".")
        for depth in range(min(_DEPTH, len(path) - 1) + 1):
            prefix = "".join(f"{part}." for part in path[:depth])
            whole[prefix] += ".".join(path[depth:]) in names
            parts[prefix] += path[depth] in top
    score = whole if any(whole.values()) else parts
    best = max(score.values())
    near = [prefix for prefix, count in score.items() if count >= max(_NEARLY * best, 1)]
    averages = [prefix for prefix in near if _IS_AVERAGE.search(prefix)]
    rest = [prefix for prefix in near if prefix not in averages and score[prefix] == best]
    choice = (averages if average else []) or rest or [""]
    if len(choice) > 1:
        raise InputError(
            key, uri, f"holds weights of {name} more than once: {', '.join(choice)}; save one set"
        )
    prefix = choice[0]
    tensors = {
        tensor.removeprefix(prefix): value
        for tensor, value in found.tensors.items()
        if tensor.startswith(prefix)
    }
    said = prefix.rstrip(".") if len(near) > 1 or _IS_AVERAGE.search(prefix) else ""
    return tensors, "/".join(part for part in (found.chosen, said) if part)


def _classes(name: str, tensors: Mapping[str, Tensor]) -> int:
    """Classes that the weights know; 0 where they have no classifier."""
    known = timm.get_pretrained_cfg(name)
    named = known.classifier if known is not None else None
    heads = (named,) if isinstance(named, str) else tuple(named or ())
    for head in (*heads, "head", "head.fc", "fc", "classifier"):
        for part in ("bias", "weight"):
            if (found := tensors.get(f"{head}.{part}")) is not None:
                return int(found.shape[0])
    return 0


def _reason(error: Exception, tensors: Mapping[str, Tensor]) -> str:
    if is_of_transformers(tensors):
        return "its names are those of the transformers library; take timm's weights of that model"
    lines = [line.strip() for line in str(error).splitlines()] or [type(error).__name__]
    text = " ".join(lines[1:] or lines)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]} …"


def _refuse_resampled(model: nn.Module, tensors: Mapping[str, Tensor], uri: str, key: str) -> None:
    """timm fits position tables to the images of the model: in silence, another model would come of it."""
    for name, value in model.state_dict().items():
        given = tensors.get(name)
        if given is not None and given.shape != value.shape and _RESAMPLED.search(name):
            expected = (
                f"{name} is {list(given.shape)}, and that of the model {list(value.shape)}: it is of other"
            )
            raise InputError(key, uri, f"{expected} images; give their size by model.args.img_size")


@contextmanager
def _local_file(uri: str, key: str) -> Iterator[Path]:
    """A file (any pyarrow URI) on this machine, for as long as it is read."""
    system, path = resolve(uri, key)
    try:
        there = system.get_file_info(path).type
        if there != fs.FileType.File:
            missing = there == fs.FileType.NotFound
            raise InputError(key, uri, "no such file" if missing else "must be a file of weights")
        if isinstance(system, fs.LocalFileSystem):
            yield Path(path)
            return
        with tempfile.TemporaryDirectory(prefix="espalier-") as folder:
            copy = Path(folder) / Path(path).name
            with system.open_input_stream(path) as source, copy.open("wb") as target:
                shutil.copyfileobj(source, target)
            yield copy
    except OSError as error:
        raise InputError(key, uri, f"cannot be reached ({first_line(error)})") from None
