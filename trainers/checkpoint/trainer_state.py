"""The state of training, from which a run resumes bit for bit: write, verify and read it, without pickle.

``trainer.safetensors`` has the optimizer's tensors, and the trained weights where those of the checkpoint are
their moving average; ``trainer.json`` has the rest, and a checksum of every file of the folder.
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
    """Add the state of training to a checkpoint folder, as its last file: it has checksums of all files.

    Args:
        folder: the checkpoint folder.
        tensors: of the optimizer, and the trained weights where needed, by name.
        progress: the rest, in JSON's types.
    """
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / STATE_TENSORS)
    files = sums(folder, sorted(path.name for path in folder.iterdir() if path.name != STATE_PROGRESS))
    content = {"files": files, **progress}
    verified = {"seal": _checksum(content), "state": content}
    (folder / STATE_PROGRESS).write_text(json.dumps(verified, sort_keys=True))


def read_state(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and the rest of a folder in which :func:`damage` finds nothing."""
    content: dict[str, Any] = json.loads((folder / STATE_PROGRESS).read_text())["state"]
    return load_file(folder / STATE_TENSORS), content


def damage(folder: Path) -> str | None:
    """Find what is damaged in a checkpoint folder with the state of training.

    Returns:
        A message: a file is missing, truncated or changed, or has values that are not finite, as earlier
        versions could write them. ``None``: the folder is intact.
    """
    try:
        stored = json.loads((folder / STATE_PROGRESS).read_text())
        if _checksum(stored["state"]) != stored["seal"]:
            return f"{STATE_PROGRESS} is not as it was written"
        files: dict[str, str] = stored["state"]["files"]
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


# settings that may differ between a checkpoint and the run that resumes from it: the result is the same
_FREE = {"name", "threads", "lineage", "keep_folder", "origin"}
_FREE_TRAINING = {"data_workers", "checkpoint_every", "checkpoint_minutes", "checkpoint_steps"}


def identity(job: TrainJob) -> dict[str, Any]:
    """The settings of a job that decide its result."""
    content = job.model_dump(mode="json", exclude=_FREE)
    content["training"] = {k: v for k, v in content["training"].items() if k not in _FREE_TRAINING}
    return content


def check_identity(job: TrainJob, known: Mapping[str, Any], differs: Collection[str] = ()) -> None:
    """Check that a checkpoint belongs to a job.

    Args:
        job: the job that resumes.
        known: the :func:`identity` of the checkpoint's job.
        differs: keys whose values may differ.

    Raises:
        InputError: a checkpoint of another recipe; names the first keys that differ.
    """
    differences = _differences(identity(job), known, differs)
    if differences:
        raise InputError("resume", job.name, f"the checkpoint is of another recipe: {differences}")


def check_recorded(job: TrainJob, recipe: Mapping[str, Any]) -> None:
    """Check that a model that was kept belongs to a job, by the ``recipe`` in its record.

    Raises:
        InputError: as :func:`check_identity`.
    """
    ours = {key: value for key, value in identity(job).items() if key in recipe}
    free = {f"training.{key}" for key in _FREE_TRAINING}
    differences = _differences(ours, recipe, free)
    if differences:
        raise InputError("resume", job.name, f"the checkpoint is of another recipe: {differences}")


def _differences(ours: Mapping[str, Any], theirs: Mapping[str, Any], ignored: Collection[str]) -> str:
    """Format the first keys whose values differ, without the ignored ones; empty if there are none."""
    own, recorded = _flat(ours), _flat(theirs)
    differ = [
        key
        for key in sorted(own.keys() | recorded.keys())
        if key not in ignored and own.get(key) != recorded.get(key)
    ]
    return ", ".join(f"{key} {recorded.get(key)!r} there and {own.get(key)!r} here" for key in differ[:3])


def _flat(content: Mapping[str, Any]) -> dict[str, Any]:
    """Values by dotted keys; an empty mapping counts as one that is not there, as in older checkpoints."""
    return {
        key: list(value) if isinstance(value, tuple) else value
        for key, value in flatten(content).items()
        if value != {}
    }


def flatten_optimizer(state: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Split an optimizer's ``state_dict`` into tensors by ``number/key``, and the rest for JSON."""
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


# entries of an optimizer's parameter groups that come from the recipe's settings, and not from its steps
GROUP_SETTINGS = ("lr", "initial_lr", "lr_scale", "weight_decay")


def unflatten_optimizer(
    tensors: Mapping[str, Tensor],
    rest: Mapping[str, Any],
    groups: list[dict[str, Any]],
    own: Collection[str] = (),
) -> dict[str, Any]:
    """Join what :func:`flatten_optimizer` split.

    Args:
        tensors: by ``number/key``.
        rest: the rest of the state.
        groups: parameter groups of the new optimizer.
        own: keys of these groups that keep the new optimizer's values.

    Returns:
        A dictionary for the optimizer's ``load_state_dict``.
    """
    state: dict[int, dict[str, Any]] = {}
    for path, value in {**rest["plain"], **tensors}.items():
        number, key = path.split("/", 1)
        state.setdefault(int(number), {})[key] = value
    merged = [
        new | {key: value for key, value in old.items() if key not in own}
        for new, old in zip(groups, rest["groups"], strict=True)
    ]
    return {"state": state, "param_groups": merged}


def _checksum(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _plain(value: Any) -> Any:
    return value.item() if torch.is_tensor(value) else value
