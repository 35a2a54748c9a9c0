"""Build timm models, by architecture, from a hub or from a folder; read and set their attributes."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import timm
from timm.data import resolve_model_data_config
from torch import Tensor, nn

from pruners.errors import InputError, did_you_mean, first_line
from trainers.config.data import DataSettings, ModelSettings
from trainers.models.private_apis import AnyBatchNorm, download_from_hf, load_cfg_from_json
from trainers.models.transformers_names import transformers_model


def build_model(settings: ModelSettings, data: DataSettings | None = None) -> nn.Module:
    """Build a model by its architecture.

    Args:
        settings: the recipe's model; it has no checkpoint.
        data: its mean and standard deviation replace those of the model's preprocessing.

    Raises:
        InputError: an unknown architecture, or arguments that it refuses.
    """
    name = settings.architecture
    assert name is not None, "a checkpoint is loaded by trainers.checkpoint.folder"
    if "hf-hub:" not in name and not timm.is_model(name):
        raise InputError("model.architecture", name, f"no timm model{did_you_mean(name, timm.list_models())}")
    arguments = dict(settings.args)
    overlay = normalisation(data)
    size = arguments.get("img_size")
    try:
        if size is not None:
            # timm's preprocessing follows the configuration of the pretrained weights, not img_size
            overlay |= {"input_size": (3, *_sides(size))} | ({} if settings.pretrained else {"crop_pct": 1.0})
        model: nn.Module = timm.create_model(
            name,
            pretrained=settings.pretrained,
            num_classes=settings.classes,
            pretrained_cfg_overlay=overlay or None,
            **arguments,
        )
        return model
    except (MemoryError, OSError):  # a fault of the machine or of the network, not of the arguments
        raise
    except Exception as error:  # architectures raise anything for arguments that they do not support
        raise InputError("model.args", arguments, f"{name} refuses them ({first_line(error)})") from None


def normalisation(data: DataSettings | None) -> dict[str, Any]:
    """The part of timm's preprocessing that a recipe may override: mean and standard deviation."""
    known = {} if data is None else {"mean": data.mean, "std": data.std}
    return {key: tuple(value) for key, value in known.items() if value is not None}


def load_timm_folder(
    folder: Path, weights: Mapping[str, Tensor] | None = None, **arguments: Any
) -> nn.Module:
    """Build the model of a checkpoint folder, as plain timm does.

    Args:
        folder: in timm's hub format.
        weights: used in place of the folder's ``model.safetensors``.
        arguments: for the model, over those of the folder.
    """
    if weights is not None:  # with the source "local-dir" timm would read the folder's file
        arguments["pretrained_cfg_overlay"] = {"source": "", "state_dict": dict(weights)}
    model: nn.Module = timm.create_model(f"local-dir:{folder}", pretrained=True, **arguments)
    if weights is not None:
        config: Any = model.pretrained_cfg
        config["source"] = "local-dir"
        del config["state_dict"]  # else the configuration would hold a second copy of the weights
    known = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("model_args") or {}
    return as_built(model, known.get("img_size"), known.get("in_chans"))


def build_like(model: nn.Module, arguments: Mapping[str, Any]) -> nn.Module:
    """Build a model of the same architecture and preprocessing, with other arguments and new weights."""
    known: Any = model.pretrained_cfg
    config = dict(known)
    given = {"num_classes": classes(model), **arguments}
    made: nn.Module = timm.create_model(config["architecture"], pretrained_cfg=config, **given)
    return as_built(made)


def missing_config(model: nn.Module) -> dict[str, Any]:
    """The classifier's name, if the model's configuration lacks it: timm needs it for a new classifier."""
    config: Any = model.pretrained_cfg
    known = timm.get_pretrained_cfg(config["architecture"])
    if config.get("classifier") is not None or known is None or known.classifier is None:
        return {}
    return {"classifier": known.classifier}


def as_built(model: nn.Module, size: Any = None, channels: int | None = None) -> nn.Module:
    """Set the input size of a model's preprocessing to the size for which the model was built.

    timm takes the input size from the configuration of the pretrained weights: with ``img_size: 384`` it
    would stay 224.

    Args:
        model: changed in place.
        size: height and width (or one number for both) for which it was built, if the model does not know it.
        channels: number of input channels, if it is not the usual one.

    Returns:
        The same model.
    """
    config: Any = getattr(model, "pretrained_cfg", None)
    if config and config.get("input_size"):
        usual, *sides = config["input_size"]
        held = getattr(getattr(model, "patch_embed", None), "img_size", None) or size
        config["input_size"] = (channels or usual, *(sides if held is None else _sides(held)))
    return model


def _sides(size: Any) -> tuple[int, int]:
    """Height and width of timm's ``img_size``."""
    height, width = (size, size) if isinstance(size, int) else size
    return height, width


def replace_head(model: nn.Module, classes: int) -> None:
    """Replace a model's classifier by a new one for ``classes`` classes, initialised by timm.

    Raises:
        InputError: a model without a classifier that can be replaced.
    """
    reset = getattr(model, "reset_classifier", None)
    if reset is None:
        raise InputError("classes", classes, f"{type(model).__name__} has no classifier that can be replaced")
    reset(classes)
    if label_names(model):
        known: Any = model.pretrained_cfg
        _configure(model, {key: value for key, value in known.items() if key != "label_names"})


def load_hub(name: str, classes: int | None = None, **arguments: Any) -> nn.Module:
    """Load a model from the Hugging Face hub.

    Args:
        name: ``hf-hub:NAME``.
        classes: another number of classes brings a new classifier; default: that of the weights.
        arguments: for timm's model.

    Raises:
        InputError: a model of another library.
    """
    extra = {} if classes is None else {"num_classes": classes}
    try:
        model: nn.Module = timm.create_model(name, pretrained=True, **extra, **arguments)
    except KeyError as error:
        if error.args != ("architecture",):
            raise
        file = download_from_hf(name.removeprefix("hf-hub:"), "config.json")
        foreign = transformers_model(load_cfg_from_json(file))
        raise InputError("model", name, f"is {foreign or 'no model of timm'}") from None
    return as_built(model)


def data_config(model: nn.Module) -> dict[str, Any]:
    """timm's preprocessing of a model: input size, mean, std, interpolation, crop."""
    config: dict[str, Any] = resolve_model_data_config(model)
    return config


def label_names(model: nn.Module) -> tuple[str, ...]:
    """Names of the classes in the order of their labels, from timm's configuration; ``()`` if it has none."""
    config: Any = getattr(model, "pretrained_cfg", None) or {}
    names = config.get("label_names") or ()
    if isinstance(names, Mapping):  # timm allows {index: name} too
        ordered = sorted(names, key=int) if all(str(key).isdecimal() for key in names) else []
        names = [names[key] for key in ordered]
    return tuple(map(str, names))


def name_classes(model: nn.Module, names: Sequence[str]) -> None:
    """Write the names of the classes into the model's configuration, if there is a name for each.

    They are stored with every checkpoint of the model, as timm's ``label_names``.
    """
    if len(names) != getattr(model, "num_classes", None):
        return
    known: Any = model.pretrained_cfg
    # timm drops the names if the configuration has another number of classes
    _configure(model, {**known, "label_names": list(names), "num_classes": len(names)})


def _configure(model: nn.Module, config: dict[str, Any]) -> None:
    """Give a model its own configuration: timm's is shared by all models of an architecture."""
    model.pretrained_cfg = config  # type: ignore[assignment]  # timm's attribute, which nn.Module has not


def classes(model: nn.Module) -> int:
    """Number of classes of a model."""
    count: Any = model.num_classes
    return int(count)


def batch_normed(model: nn.Module) -> bool:
    """Return whether a model has batch norms, which need more than one image for training."""
    return any(isinstance(module, AnyBatchNorm) for module in model.modules())


def input_size(model: nn.Module) -> tuple[int, int, int]:
    """(channels, height, width) of a model's input."""
    channels, height, width = data_config(model)["input_size"]
    return channels, height, width
