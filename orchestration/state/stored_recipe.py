"""The recipe of a sweep, stored in its folder: ``resume`` runs it, and a new start must match it.

The storage is not stored (it is the storage in which the recipe lies), nor is any password.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from pyarrow import fs

from orchestration.recipe.dotted_keys import flatten
from orchestration.recipe.loading import overridden, single_run
from orchestration.recipe.schema import Recipe
from orchestration.recipe.search import LIMITS
from orchestration.recipe.validation import validate
from pruners.errors import InputError, did_you_mean
from pruners.redaction import strip_credentials
from trainers import storage
from trainers.remote_calls import call_limited

RESULTS = "results.json"  # beside it once the sweep has ended: its table of final models
_FILE = "recipe.json"
_SHOWN = 6
# Keys that may change when a sweep is resumed: number and limits of trials, share of the cluster, further
# methods and sparsities, a long run, INT8 or files for engines after them, storage and tracking. Existing
# results stay valid.
_FREE = (
    *(f"{search}.{key}" for search in ("allocation", "schedule") for key in ("trials", *sorted(LIMITS))),
    "allocation.cpus_per_trial",
    "allocation.gpus_per_trial",
    "allocation.sparsities",
    "description",
    "export",
    "long_run",
    "pruning.methods",
    "quantize",
    "resources",
    "storage",
    "tracking",
)


def folder_of(storage_uri: str, name: str) -> str:
    """The folder for the results of a sweep, in the storage at ``storage_uri``."""
    return f"{storage.absolute(storage_uri)}/sweeps/{name}"


def store(recipe: Recipe) -> None:
    """Write the recipe into its sweep's folder."""
    storage.write_json(f"{folder_of(recipe.storage, recipe.name)}/{_FILE}", content_of(recipe))


def load(storage_uri: str, name: str, overrides: Sequence[str] = ()) -> Recipe:
    """Read the recipe that the sweep of this name was last started with.

    Args:
        storage_uri: the storage.
        name: of the sweep.
        overrides: ``key.sub=value`` strings that replace what is stored.

    Returns:
        The recipe, with ``storage_uri`` as its storage.

    Raises:
        InputError: no sweep of this name, one that has stored no recipe, or an override that is wrong.
    """
    check_exists(storage_uri, name)
    file = f"{folder_of(storage_uri, name)}/{_FILE}"
    if not storage.exists(file):
        raise InputError("name", name, "has stored no recipe; start it again by 'espalier sweep'")
    content = storage.read_json(file) | {"storage": storage_uri}
    login = os.environ.get("MLFLOW_TRACKING_URI")
    if login is not None and strip_credentials(login) == content["tracking"]["uri"]:
        content["tracking"]["uri"] = login
    return overridden(content, overrides)


def sweep_names(storage_uri: str) -> list[str]:
    """The sweeps of a storage.

    Raises:
        InputError: there is none.
    """
    system, path = storage.resolve(f"{storage.absolute(storage_uri)}/sweeps")
    try:
        entries = call_limited(storage_uri, system.get_file_info, fs.FileSelector(path, allow_not_found=True))
    except OSError as error:
        raise InputError("storage", storage_uri, f"cannot be read ({error})") from None
    sweeps = sorted(entry.base_name for entry in entries if entry.type == fs.FileType.Directory)
    if not sweeps:
        raise InputError("storage", storage_uri, "no sweep has been run there")
    return sweeps


def check_exists(storage_uri: str, name: str) -> None:
    """Check that there is a sweep of this name.

    Raises:
        InputError: there is none in the storage at ``storage_uri``.
    """
    known = sweep_names(storage_uri)
    if name not in known:
        raise InputError("name", name, f"no such sweep in {storage_uri}{did_you_mean(name, known)}")


def check_unchanged(recipe: Recipe) -> None:
    """Check that a sweep of the recipe's name, if there is one, was started with the same recipe.

    Raises:
        InputError: it was another recipe; names the keys that differ.
    """
    file = f"{folder_of(recipe.storage, recipe.name)}/{_FILE}"
    if not storage.exists(file):
        return
    differing = changes(validate(storage.read_json(file)), recipe)
    if differing:
        shown = "; ".join(f"{key}: {old} → {new}" for key, (old, new) in list(differing.items())[:_SHOWN])
        more = f" and {len(differing) - _SHOWN} more" if len(differing) > _SHOWN else ""
        advice = "take the old values to go on, or --as NEW for a sweep of its own"
        raise InputError("name", recipe.name, f"was begun with another recipe ({shown}{more}); {advice}")


def changes(old: Recipe, new: Recipe) -> dict[str, tuple[Any, Any]]:
    """Keys that differ and must not, each with the old value and the new one."""
    # one run without a search is a part of the sweep of the same recipe
    if _is_single(new):
        old = single_run(old, new.pruning.methods[0])
    elif _is_single(old):
        new = single_run(new, old.pruning.methods[0])
    before, after = flatten(content_of(old)), flatten(content_of(new))
    return {
        key: (before.get(key), after.get(key))
        for key in sorted({*before, *after})
        if before.get(key) != after.get(key) and not f"{key}.".startswith(tuple(f"{free}." for free in _FREE))
    }


def _is_single(recipe: Recipe) -> bool:
    return len(recipe.pruning.methods) == 1 and not recipe.allocation.trials and not recipe.schedule.space


def content_of(recipe: Recipe) -> dict[str, Any]:
    """A recipe as JSON, without its storage: paths in full, addresses without a login."""
    content = recipe.model_dump(mode="json", exclude={"storage"})
    for part in ("train", "validation", "test"):
        if content["data"][part] is not None:
            content["data"][part] = storage.absolute(content["data"][part])
    checkpoint = content["model"]["checkpoint"]
    if checkpoint is not None and not recipe.model.is_fetched:
        content["model"]["checkpoint"] = storage.absolute(checkpoint)
    without_logins: dict[str, Any] = _without_logins(content)
    return without_logins


def _without_logins(value: Any) -> Any:
    """A recipe's content without logins in addresses: of data, checkpoint, teachers, MLflow."""
    if isinstance(value, dict):
        return {key: _without_logins(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_logins(item) for item in value]
    return strip_credentials(value) if isinstance(value, str) else value
