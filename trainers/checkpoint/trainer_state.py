"""What a run needs to go on exactly where it was, beside the model: written, checked, read. No pickle.

``trainer.safetensors`` holds the optimizer's tensors and the weights that are trained (where the checkpoint's
own are their moving average); ``trainer.json`` the rest, and a checksum of every file of the folder.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from pruners.errors import InputError
from trainers.checkpoint.checksums import sha256, sums
from trainers.checkpoint.finite import describe, not_finite
from trainers.checkpoint.folder import TRAINER_FILES, WEIGHTS
from trainers.config.base import flatten
from trainers.config.jobs import TrainJob

STATE_TENSORS, STATE_PROGRESS = TRAINER_FILES


def write_state(folder: Path, tensors: Mapping[str, Tensor], progress: Mapping[str, Any]) -> None:
    """Add a run's state to a checkpoint folder; comes last, as it seals the others."""
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / STATE_TENSORS)
    files = sums(folder, sorted(path.name for path in folder.iterdir() if path.name != STATE_PROGRESS))
    content = {"files": files, **progress}
    (folder / STATE_PROGRESS).write_text(
        json.dumps({"seal": _seal(content), "state": content}, sort_keys=True)
    )


def read_state(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and the rest, of a folder that :func:`damage` finds nothing in."""
    content: dict[str, Any] = json.loads((folder / STATE_PROGRESS).read_text())["state"]
    return load_file(folder / STATE_TENSORS), content


def damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint folder: a file missing, truncated or changed, or weights that are not
    finite, as earlier versions could leave; ``None`` if nothing."""
    try:
        sealed = json.loads((folder / STATE_PROGRESS).read_text())
        if _seal(sealed["state"]) != sealed["seal"]:
            return f"{STATE_PROGRESS} is not as it was written"
        files: dict[str, str] = sealed["state"]["files"]
    except (OSError, ValueError, KeyError, TypeError):
        return f"{STATE_PROGRESS} is missing or cannot be read"
    for name, expected in files.items():
        if not (folder / name).is_file():
            return f"{name} is missing"
        if sha256(folder / name) != expected:
            return f"{name} is not as it was written"
    for name in (WEIGHTS, STATE_TENSORS):
        broken = not_finite(load_file(folder / name)) if name in files else []
        if broken:
            return f"{name} holds values to go on from that are none: {describe(broken)}"
    return None


# what may change between a checkpoint and the run that goes on from it, without another result
_FREE = {"name", "threads", "lineage", "keep_folder", "origin"}
_FREE_TRAINING = {"data_workers", "checkpoint_every", "checkpoint_minutes", "checkpoint_steps"}


def identity(job: TrainJob) -> dict[str, Any]:
    """What of a job decides its result."""
    content = job.model_dump(mode="json", exclude=_FREE)
    content["training"] = {k: v for k, v in content["training"].items() if k not in _FREE_TRAINING}
    return content


def check_identity(job: TrainJob, known: Mapping[str, Any], differs: Collection[str] = ()) -> None:
    """Whether a checkpoint is one of this job; its values of the keys in ``differs`` may be others.

    Raises:
        InputError: a checkpoint of another recipe, naming the first keys that differ.
    """
    told = _differences(identity(job), known, differs)
    if told:
        raise InputError("resume", job.name, f"the checkpoint is of another recipe: {told}")


def check_recorded(job: TrainJob, recipe: Mapping[str, Any]) -> None:
    """Whether a model that was kept is one of this job, by the settings that its record keeps as ``recipe``.

    Raises:
        InputError: as :func:`check_identity`.
    """
    ours = {key: value for key, value in identity(job).items() if key in recipe}
    free = {f"training.{key}" for key in _FREE_TRAINING}
    told = _differences(ours, recipe, free)
    if told:
        raise InputError("resume", job.name, f"the checkpoint is of another recipe: {told}")


def _differences(ours: Mapping[str, Any], theirs: Mapping[str, Any], but: Collection[str]) -> str:
    """The first keys, but for some, whose values differ, in words; empty if none do."""
    here, there = _flat(ours), _flat(theirs)
    differ = [
        key
        for key in sorted(here.keys() | there.keys())
        if key not in but and here.get(key) != there.get(key)
    ]
    return ", ".join(f"{key} {there.get(key)!r} there and {here.get(key)!r} here" for key in differ[:3])


def _flat(content: Mapping[str, Any]) -> dict[str, Any]:
    """Values by dotted keys; an empty mapping counts as one that is not there, as in older checkpoints."""
    return {
        key: list(value) if isinstance(value, tuple) else value
        for key, value in flatten(content).items()
        if value != {}
    }


def flatten_optimizer(state: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of an optimizer's state by ``number/key``, and the rest as JSON can hold it."""
    tensors: dict[str, Tensor] = {}
    plain: dict[str, Any] = {}
    for number, values in state["state"].items():
        for key, value in values.items():
            (tensors if torch.is_tensor(value) else plain)[f"{number}/{key}"] = value
    # some optimizers count their steps in the parameter groups
    groups = [
        {key: _plain(value) for key, value in group.items() if key != "params"}
        for group in state["param_groups"]
    ]
    return tensors, {"plain": plain, "groups": groups}


# what the settings of a recipe, and no step, have put into an optimizer's groups
GROUP_SETTINGS = ("lr", "initial_lr", "lr_scale", "weight_decay")


def unflatten_optimizer(
    tensors: Mapping[str, Tensor],
    rest: Mapping[str, Any],
    groups: list[dict[str, Any]],
    own: Collection[str] = (),
) -> dict[str, Any]:
    """What ``load_state_dict`` takes.

    Args:
        groups: of the new optimizer.
        own: keys of these groups that stay as they are there.
    """
    state: dict[int, dict[str, Any]] = {}
    for place, value in {**rest["plain"], **tensors}.items():
        number, key = place.split("/", 1)
        state.setdefault(int(number), {})[key] = value
    merged = [
        new | {key: value for key, value in old.items() if key not in own}
        for new, old in zip(groups, rest["groups"], strict=True)
    ]
    return {"state": state, "param_groups": merged}


def _seal(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _plain(value: Any) -> Any:
    return value.item() if torch.is_tensor(value) else value
