"""``espalier import``: a file of weights as a checkpoint folder, which every command takes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import PurePosixPath
from typing import Any, cast

from orchestration.commands.output import free_folder, whole_folder
from orchestration.recipe.loading import load_part
from pruners.errors import InputError
from trainers.checkpoint.folder import save_imported, size_on_disk
from trainers.config.base import is_weights_file
from trainers.config.data import ModelSettings
from trainers.models import factory
from trainers.models.weights_file import load_weights
from trainers.storage import absolute

_OPTIONS = {"model.architecture": "--architecture", "model.args": "--arg"}
_PHRASES = {"model.architecture": "--architecture", "model.args.img_size": "--arg img_size=…"}


def import_weights(
    file: str, out: str, architecture: str | None, arguments: Sequence[str], *, average: bool
) -> Iterator[str]:
    """Write a file of weights as a checkpoint folder.

    Args:
        file: as training scripts leave it.
        out: the folder to write.
        architecture: timm's name; ``None``: what the file says.
        arguments: ``KEY=VALUE`` of timm's model, the value in YAML.
        average: take the moving average, where the file holds one.

    Returns:
        Lines about what was read and written.

    Raises:
        InputError: a file that cannot be read or does not fit, or a folder that cannot be written.
    """
    if not is_weights_file(file):
        raise InputError("FILE", file, "must be a file of weights: .pth, .pth.tar, .pt, .ckpt, .safetensors")
    target = free_folder(out, "--out")
    defaults = {"checkpoint": absolute(file), "architecture": architecture}
    with InputError.renamed(_OPTIONS, _PHRASES):
        settings = load_part(ModelSettings, [f"args.{argument}" for argument in arguments], defaults)
        model, chosen = load_weights(absolute(file), architecture, settings.args, average=average, key="FILE")
    with whole_folder(target, out, "--out") as folder:
        save_imported(folder, model, file, chosen, model_args={})
    height, width = factory.input_size(model)[1:]
    config, about = factory.data_config(model), cast(dict[str, Any], model.pretrained_cfg)
    yield f"model       {about['architecture']}, {factory.classes(model)} classes"
    yield f"weights     {PurePosixPath(file).name}" + (f", {chosen}" if chosen else "")
    yield f"images      {height} by {width}, mean {list(config['mean'])}, std {list(config['std'])}"
    yield f"written to  {out} ({size_on_disk(target) / 1e6:.2f} MB)"
