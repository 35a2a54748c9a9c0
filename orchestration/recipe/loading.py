"""Recipes from YAML: ``extends:``, overrides from the command line, one line for each mistake."""

from __future__ import annotations

import copy
import os
import re
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from orchestration.recipe.dotted_keys import put
from orchestration.recipe.schema import Recipe
from orchestration.recipe.validation import S, _one_line, validate
from pruners.errors import InputError, did_you_mean


def load_recipe(name: str, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe by its path or by the name of one that comes with espalier.

    Args:
        name: a path, or the name of a recipe that is part of espalier.
        overrides: ``key.sub=value`` strings, the value in YAML.

    Raises:
        InputError: for the first error, by key and value.
    """
    content = _read(_find(name), ())
    _override(content, overrides)
    content.setdefault("name", Path(name).stem)
    _from_environment(content)
    return validate(content)


def load_part(kind: type[S], overrides: Sequence[str], defaults: Mapping[str, Any]) -> S:
    """Make one part of a recipe, from ``key.sub=value`` strings over some defaults.

    Args:
        kind: the settings class of the part.
        overrides: ``key.sub=value`` strings, the value in YAML.
        defaults: the values below the overrides.

    Returns:
        The settings, checked.

    Raises:
        InputError: for the first error, by its key within the part.
    """
    content = copy.deepcopy(dict(defaults))
    _override(content, overrides)
    try:
        return kind.model_validate(content)
    except ValidationError as error:
        raise _one_line(error, kind) from None


def overridden(content: dict[str, Any], overrides: Sequence[str]) -> Recipe:
    """The recipe of a whole content, with ``key.sub=value`` strings over it.

    Raises:
        InputError: whatever is wrong, by key and value.
    """
    _override(content, overrides)
    return validate(content)


def _override(content: dict[str, Any], overrides: Sequence[str]) -> None:
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals:
            raise InputError("override", override, "must have the form key.sub=value")
        put(content, key, _parse_yaml(value, f"override {key}"))


def _from_environment(content: dict[str, Any]) -> None:
    """Take storage and MLflow from the environment of a cluster's nodes, where the recipe names none."""
    if "ESPALIER_STORAGE" in os.environ:
        content.setdefault("storage", os.environ["ESPALIER_STORAGE"])
    tracking = content.setdefault("tracking", {})
    if "MLFLOW_TRACKING_URI" in os.environ and isinstance(tracking, dict):
        tracking.setdefault("uri", os.environ["MLFLOW_TRACKING_URI"])


def with_values(recipe: Recipe, values: Mapping[str, Any]) -> Recipe:
    """The recipe with some keys (``recovery.lr.peak``) changed, and checked again."""
    if not values:
        return recipe
    content = recipe.model_dump(mode="json")
    for key, value in values.items():
        put(content, key, value)
    return validate(content)


def single_run(recipe: Recipe, method: str) -> Recipe:
    """The recipe of one run without a search: one method, its own allocation, the recipe's own schedule."""
    content = recipe.model_dump(mode="json")
    content["pruning"]["methods"] = [method]
    content["allocation"]["trials"] = 0
    content["schedule"] |= recipe.schedule.alone
    return validate(content)


def describe_shipped() -> list[tuple[str, str]]:
    """(name, one line) of each recipe that comes with espalier."""
    return [(name, str(_read(path, ()).get("description", ""))) for name, path in shipped().items()]


def shipped() -> dict[str, Path]:
    """The recipes that are part of espalier, by name (``demo``, ``dimap/swin_t_dimap2``)."""
    root = Path(str(files("experiments")))
    return {
        str(path.relative_to(root).with_suffix("")): path
        for path in sorted(root.rglob("*.yaml"))
        if not path.name.startswith("_")
    }


def _find(name: str) -> Path:
    path = Path(name)
    if _is_file(path):
        return path
    known = shipped()
    stem = re.sub(r"^experiments/|\.yaml$", "", name)
    if stem in known:
        return known[stem]
    raise InputError(
        "recipe", name, f"no such file or recipe{did_you_mean(stem, known)}; see 'espalier recipes'"
    )


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # a name too long for any file
        return False


def _read(path: Path, above: tuple[Path, ...]) -> dict[str, Any]:
    if path.resolve() in above:
        raise InputError("extends", str(path), "goes round in a circle")
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError("recipe", str(path), f"must be a readable text file ({error})") from None
    content = _parse_yaml(text, str(path))
    if not isinstance(content, dict):
        raise InputError("recipe", str(path), "must be a YAML mapping of keys to values")
    base = content.pop("extends", None)
    if base is None:
        return content
    if not isinstance(base, str):
        raise InputError("extends", base, "must be the path or name of a recipe")
    beside = path.parent / base
    source = beside if _is_file(beside) else _find(base)
    return _merge(_read(source, (*above, path.resolve())), content)


def _merge(below: dict[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(below)
    for key, value in above.items():
        if isinstance(value, dict) and isinstance(merged.get(key), dict):
            merged[key] = _merge(merged[key], value)
        else:
            merged[key] = value
    return merged


class _NumberLoader(yaml.SafeLoader):
    """A loader that reads 1e-4 as a number; YAML 1.1 takes it for a string."""


_NumberLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"),
    list("-+0123456789."),
)


def _parse_yaml(text: str, where: str) -> Any:
    try:
        content = yaml.load(text, Loader=_NumberLoader)  # a SafeLoader: it builds plain values only
        _check_ends(content, set(), set())
        return content
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # 2001-99-99 is a ValueError
        reason = str(getattr(error, "problem", None) or error or type(error).__name__).splitlines()[0]
        mark = getattr(error, "problem_mark", None)
        line = f" in line {mark.line + 1}" if mark is not None else ""
        raise InputError("recipe", where, f"must be YAML ({reason}{line})") from None


def _check_ends(value: Any, above: set[int], known: set[int]) -> None:
    """Check that no value is part of itself, as a YAML anchor can make it: walking it would never end.

    Args:
        value: mappings, lists and plain values.
        above: ids of the values that hold this one.
        known: ids of those that were checked, as one value may stand in many places.

    Raises:
        ValueError: one is.
    """
    if not isinstance(value, (dict, list, tuple)) or id(value) in known:
        return
    if id(value) in above:
        raise ValueError("a value holds itself")
    above.add(id(value))
    for part in value.values() if isinstance(value, dict) else value:
        _check_ends(part, above, known)
    above.remove(id(value))
    known.add(id(value))
