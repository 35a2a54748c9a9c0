"""The only place that builds timm models: by architecture, from a hub, or from a checkpoint folder."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import timm
from timm.data import resolve_model_data_config
from timm.models import _hub
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from pruners.errors import InputError, did_you_mean, first_line
from trainers.config.data import DataSettings, ModelSettings
from trainers.models.transformers_names import transformers_model


def build_model(settings: ModelSettings, data: DataSettings | None = None) -> nn.Module:
    """A model by its architecture; ``data`` sets the normalisation that travels with it.

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
            # timm's preprocessing goes by its own configuration, whatever the model is built for
            overlay |= {"input_size": (3, *_sides(size))} | ({} if settings.pretrained else {"crop_pct": 1.0})
        model: nn.Module = timm.create_model(
            name,
            pretrained=settings.pretrained,
            num_classes=settings.classes,
            pretrained_cfg_overlay=overlay or None,
            **arguments,
        )
        return model
    except (MemoryError, OSError):  # of this machine, or of where pretrained weights come from
        raise
    except Exception as error:  # whatever comes of numbers that the architecture was not made for
        raise InputError("model.args", arguments, f"{name} refuses them ({first_line(error)})") from None


def normalisation(data: DataSettings | None) -> dict[str, Any]:
    """What of timm's preprocessing the recipe's images decide."""
    known = {} if data is None else {"mean": data.mean, "std": data.std}
    return {key: tuple(value) for key, value in known.items() if value is not None}


def load_timm_folder(
    folder: Path, weights: Mapping[str, Tensor] | None = None, **arguments: Any
) -> nn.Module:
    """What plain timm makes of a checkpoint folder; ``weights`` stand for those of its file."""
    if weights is not None:  # another source than the folder, whose file timm would read
        arguments["pretrained_cfg_overlay"] = {"source": "", "state_dict": dict(weights)}
    model: nn.Module = timm.create_model(f"local-dir:{folder}", pretrained=True, **arguments)
    if weights is not None:
        config: Any = model.pretrained_cfg
        config["source"] = "local-dir"
        del config["state_dict"]  # they are the model's now
    known = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("model_args") or {}
    return as_built(model, known.get("img_size"), known.get("in_chans"))


def build_like(model: nn.Module, arguments: Mapping[str, Any]) -> nn.Module:
    """Another model of the same architecture and preprocessing, with arguments of its own and new weights."""
    known: Any = model.pretrained_cfg
    config = dict(known)
    given = {"num_classes": classes(model), **arguments}
    made: nn.Module = timm.create_model(config["architecture"], pretrained_cfg=config, **given)
    return as_built(made)


def as_built(model: nn.Module, size: Any = None, channels: int | None = None) -> nn.Module:
    """The same model, whose preprocessing gives images of the size and channels that it was built for.

    timm's comes from the pretrained weights' configuration: ``img_size: 384`` leaves it at 224.

    Args:
        size, channels: that it was built for, where the model itself does not hold them.
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
    """A new classifier for so many classes, as timm initialises it.

    Raises:
        InputError: a model without one.
    """
    reset = getattr(model, "reset_classifier", None)
    if reset is None:
        raise InputError("classes", classes, f"{type(model).__name__} has no classifier that can be replaced")
    reset(classes)
    if label_names(model):
        known: Any = model.pretrained_cfg
        _configure(model, {key: value for key, value in known.items() if key != "label_names"})


def load_hub(name: str, classes: int | None = None, **arguments: Any) -> nn.Module:
    """A model of a hub (``hf-hub:NAME``).

    Raises:
        InputError: one of another library.
    """
    extra = {} if classes is None else {"num_classes": classes}
    try:
        model: nn.Module = timm.create_model(name, pretrained=True, **extra, **arguments)
    except KeyError as error:
        if error.args != ("architecture",):
            raise
        file = _hub.download_from_hf(name.removeprefix("hf-hub:"), "config.json")
        foreign = transformers_model(_hub.load_cfg_from_json(file))
        raise InputError("model", name, f"is {foreign or 'no model of timm'}") from None
    return as_built(model)


def data_config(model: nn.Module) -> dict[str, Any]:
    """timm's preprocessing of a model: input size, mean, std, interpolation, crop."""
    config: dict[str, Any] = resolve_model_data_config(model)
    return config


def label_names(model: nn.Module) -> tuple[str, ...]:
    """The names of the classes by their labels, as timm's configuration has them; ``()`` if not."""
    config: Any = getattr(model, "pretrained_cfg", None) or {}
    names = config.get("label_names") or ()
    if isinstance(names, Mapping):  # timm allows {index: name} too
        ordered = sorted(names, key=int) if all(str(key).isdecimal() for key in names) else []
        names = [names[key] for key in ordered]
    return tuple(map(str, names))


def name_classes(model: nn.Module, names: Sequence[str]) -> None:
    """Let the model's configuration say what its classes are called, if there is a name for each.

    It travels with every checkpoint of the model, as timm's ``label_names``.
    """
    if len(names) != getattr(model, "num_classes", None):
        return
    known: Any = model.pretrained_cfg
    # timm drops the names of a configuration that tells of another number of classes
    _configure(model, {**known, "label_names": list(names), "num_classes": len(names)})


def _configure(model: nn.Module, config: dict[str, Any]) -> None:
    """A configuration of its own, as timm's is shared by what was built of it."""
    model.pretrained_cfg = config  # type: ignore[assignment]  # timm's attribute, which nn.Module has not


def classes(model: nn.Module) -> int:
    found: Any = model.num_classes
    return int(found)


def batch_normed(model: nn.Module) -> bool:
    """Whether it has batch norms, which need more than one image to train on."""
    return any(isinstance(module, _BatchNorm) for module in model.modules())


def input_size(model: nn.Module) -> tuple[int, int, int]:
    channels, height, width = data_config(model)["input_size"]
    return channels, height, width
