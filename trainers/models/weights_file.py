"""Load files of weights that training scripts write: timm, the original Swin and DeiT, Lightning, torch.

They are read without running any code that they contain, and loaded as timm loads its own weights.
"""

from __future__ import annotations

import argparse
import pickle
import re
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
from trainers import storage
from trainers.config.data import DataSettings, ModelSettings
from trainers.models import factory
from trainers.models.transformers_names import is_of_transformers

_AVERAGES = ("state_dict_ema", "model_ema", "ema_state_dict", "model_ema_state_dict", "ema")
_WEIGHTS = ("state_dict", "model", "model_state_dict", "net", "network", "weights")
_IS_AVERAGE = re.compile(r"(?:^|[._])ema(?:[._]|$)", re.IGNORECASE)
_MOST_PREFIXES = 4  # parts of a prefix such as module._orig_mod.model.
_NEARLY_ALL = 0.5  # share of the best prefix's names: averages may lack buffers
_RESAMPLED = re.compile(r"pos_embed|relative_position_bias_table")
_SHOWN = 240  # characters of an error message
_PREPROCESSING = ("mean", "std", "crop_pct", "interpolation")


class _Settings:
    """Stands for yacs' CfgNode, in which the original Swin stores its settings.

    It creates an ``OrderedDict``, which torch can fill when it reads with ``weights_only``.
    """

    def __new__(cls) -> Any:
        return OrderedDict()


_SCALAR: Any = np.float64(0).__reduce__()[0]
# other classes in files of training scripts; reading them runs no code
_HARMLESS: list[Any] = [
    argparse.Namespace,
    (_Settings, "yacs.config.CfgNode"),
    _SCALAR,
    (_SCALAR, "numpy.core.multiarray.scalar"),  # its name in numpy 1
    np.dtype,
    *(type(np.dtype(kind)) for kind in (np.float32, np.float64, np.int64)),
]


@dataclass(frozen=True)
class WeightsFile:
    """The content of a file of weights.

    Attributes:
        tensors: by the names in the file.
        chosen: which of several sets of weights was taken (``state_dict_ema``); empty where there is one.
        architecture: timm's name of the model, if the file has it.
        settings: of the training, as timm's ``train.py`` stores them.
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
    """Load a timm model with the weights of a file.

    Args:
        uri: a path or any pyarrow URI.
        architecture: timm's name of the model; default: the one in the file, as timm's ``train.py`` writes
            it.
        arguments: for timm's model.
        classes: another number of classes brings a new classifier; default: that of the weights.
        data: its mean and standard deviation replace those of the model's preprocessing.
        average: prefer a moving average to the weights themselves.
        key: the option or recipe key that named the file, for error messages.

    Returns:
        The model, and the name of the set of weights that was taken where the file has several.

    Raises:
        InputError: no such file, or one that cannot be read or does not fit the model.
    """
    with _local_file(uri, key) as path:
        content = read_weights(path, uri, key=key, average=average)
    name = architecture or content.architecture
    if name is None:
        advice = (
            "give model.architecture, or make a folder of it by 'espalier import FILE --architecture NAME'"
        )
        raise InputError(key, uri, f"does not say of which timm model its weights are: {advice}")
    if not timm.is_model(name):
        raise InputError("model.architecture", name, f"no timm model{did_you_mean(name, timm.list_models())}")
    overlay, given = _described(name, content.settings)
    given |= arguments or {}
    overlay |= factory.normalisation(data)
    tensors, chosen = _with_timm_names(content, name, given, uri, key, average=average)
    known_classes = _classes(name, tensors)
    overlay |= {"source": "", "state_dict": tensors, "num_classes": known_classes, "label_offset": 0}
    try:
        model: nn.Module = timm.create_model(
            name, pretrained=True, num_classes=known_classes, pretrained_cfg_overlay=overlay, **given
        )
    except (RuntimeError, KeyError, ValueError, TypeError, AssertionError, AttributeError) as error:
        raise InputError(key, uri, f"does not fit {name} ({_reason(error, tensors)})") from None
    config: Any = model.pretrained_cfg
    config.pop("state_dict", None)  # else the configuration would hold a second copy of the weights
    factory.as_built(model, given.get("img_size"), given.get("in_chans"))
    if "img_size" not in given:
        _refuse_resampled(model, tensors, uri, key)
    if classes is not None and classes != known_classes:
        factory.replace_head(model, classes)
    return model, chosen


def from_file(settings: ModelSettings, data: DataSettings | None = None) -> nn.Module:
    """Load the model of a recipe whose checkpoint is a file of weights.

    Args:
        settings: the recipe's model.
        data: its mean and standard deviation replace those of the model's preprocessing.

    Raises:
        InputError: as :func:`load_weights`.
    """
    assert settings.checkpoint is not None, "only a model with a checkpoint has weights to load"
    given = settings.architecture, settings.args
    return load_weights(settings.checkpoint, *given, classes=settings.classes, data=data)[0]


def read_weights(path: Path, uri: str, *, key: str, average: bool = True) -> WeightsFile:
    """Read a file of weights.

    Args:
        path: the local file.
        uri: the file as the user named it, for error messages.
        key: the option or recipe key that named it, for error messages.
        average: prefer a moving average to the weights themselves.

    Returns:
        The tensors, and what else the file says of their model.

    Raises:
        InputError: no file of weights, or one with objects whose reading could run code.
    """
    content = _content(path, uri, key)
    names = (*(_AVERAGES if average else ()), *_WEIGHTS)
    chosen = next((name for name in names if _tensors(content.get(name))), "")
    tensors = _tensors(content.get(chosen) if chosen else content)
    if not tensors:
        keys = ", ".join(map(str, list(content)[:8])) or "nothing"
        raise InputError(key, uri, f"holds no weights by a known name; it has {keys}")
    arguments = content.get("args")
    settings = vars(arguments) if isinstance(arguments, argparse.Namespace) else arguments
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
    except Exception:  # torch raises anything for files that are not its own
        return "is no file of torch.save"
    if not names:
        return "is damaged, or no file of torch.save"
    return f"holds objects whose reading could run code, and is not read ({', '.join(names[:4])})"


def _tensors(value: Any) -> dict[str, Tensor]:
    if not isinstance(value, Mapping):
        return {}
    return {
        name: tensor for name, tensor in value.items() if isinstance(tensor, Tensor) and isinstance(name, str)
    }


def _described(name: str, settings: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Preprocessing and arguments of the model, from the settings that timm's ``train.py`` stored."""
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


def _with_timm_names(
    content: WeightsFile, name: str, arguments: Mapping[str, Any], uri: str, key: str, *, average: bool
) -> tuple[dict[str, Tensor], str]:
    """The tensors by timm's names, without a prefix ``module.``, ``_orig_mod.``, ``model.`` …"""
    try:
        with torch.device("meta"):
            model = timm.create_model(name, **arguments)
    except (NotImplementedError, RuntimeError):  # some constructors compute with their weights
        model = timm.create_model(name, **arguments)
    except (TypeError, ValueError, AssertionError) as error:
        raise InputError(
            "model.args", dict(arguments), f"{name} refuses them ({first_line(error)})"
        ) from None
    names, top = set(model.state_dict()), {child for child, _ in model.named_children()}
    whole, parts = Counter[str](), Counter[str]()
    for tensor in content.tensors:
        path = tensor.split(".")
        for depth in range(min(_MOST_PREFIXES, len(path) - 1) + 1):
            prefix = "".join(f"{part}." for part in path[:depth])
            whole[prefix] += ".".join(path[depth:]) in names
            parts[prefix] += path[depth] in top
    score = whole if any(whole.values()) else parts
    best = max(score.values())
    near = [prefix for prefix, count in score.items() if count >= max(_NEARLY_ALL * best, 1)]
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
        for tensor, value in content.tensors.items()
        if tensor.startswith(prefix)
    }
    shown = prefix.rstrip(".") if len(near) > 1 or _IS_AVERAGE.search(prefix) else ""
    return tensors, "/".join(part for part in (content.chosen, shown) if part)


def _classes(name: str, tensors: Mapping[str, Tensor]) -> int:
    """Number of classes of the weights' classifier; 0 if they have none."""
    known = timm.get_pretrained_cfg(name)
    named = known.classifier if known is not None else None
    heads = (named,) if isinstance(named, str) else tuple(named or ())
    for head in (*heads, "head", "head.fc", "fc", "classifier"):
        for part in ("bias", "weight"):
            if (tensor := tensors.get(f"{head}.{part}")) is not None:
                return int(tensor.shape[0])
    return 0


def _reason(error: Exception, tensors: Mapping[str, Tensor]) -> str:
    if is_of_transformers(tensors):
        return "its names are those of the transformers library; take timm's weights of that model"
    lines = [line.strip() for line in str(error).splitlines()] or [type(error).__name__]
    text = " ".join(lines[1:] or lines)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]} …"


def _refuse_resampled(model: nn.Module, tensors: Mapping[str, Tensor], uri: str, key: str) -> None:
    """Refuse position tables of another size: timm would resample them silently, which changes the model."""
    for name, value in model.state_dict().items():
        given = tensors.get(name)
        if given is not None and given.shape != value.shape and _RESAMPLED.search(name):
            expected = (
                f"{name} is {list(given.shape)}, and that of the model {list(value.shape)}: it is of other"
            )
            raise InputError(key, uri, f"{expected} images; give their size by model.args.img_size")


@contextmanager
def _local_file(uri: str, key: str) -> Iterator[Path]:
    """A file (any pyarrow URI) as a local path, in a ``with`` block."""
    kind = storage.info(uri, key).type
    if kind != fs.FileType.File:
        missing = kind == fs.FileType.NotFound
        raise InputError(key, uri, "no such file" if missing else "must be a file of weights")
    try:
        with storage.local_file(uri) as path:
            yield path
    except OSError as error:
        raise InputError(key, uri, f"cannot be reached ({first_line(error)})") from None
