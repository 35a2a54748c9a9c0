"""Recipes from YAML: ``extends:``, overrides from the command line, one line for each mistake."""

from __future__ import annotations

import copy
import os
import re
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ValidationError

from orchestration.config import Recipe
from pruners.errors import InputError, did_you_mean
from trainers.settings import Settings

S = TypeVar("S", bound=Settings)


def load_recipe(name: str, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe by its path or by the name of one that comes with espalier.

    Args:
        overrides: ``key.sub=value`` strings, the value in YAML.

    Raises:
        InputError: whatever is wrong, by key and value.
    """
    content = _read(_find(name), ())
    _override(content, overrides)
    content.setdefault("name", Path(name).stem)
    _from_environment(content)
    return validate(content)


def part(kind: type[S], overrides: Sequence[str], defaults: Mapping[str, Any]) -> S:
    """A part of a recipe without the rest, from ``key.sub=value`` strings over some defaults.

    Raises:
        InputError: for the first thing that is wrong, its key as it would be within the part.
    """
    content = copy.deepcopy(dict(defaults))
    _override(content, overrides)
    try:
        return kind.model_validate(content)
    except ValidationError as error:
        raise _one_line(error, kind) from None


def overridden(content: dict[str, Any], overrides: Sequence[str]) -> Recipe:
    """The recipe of a content that is whole, with ``key.sub=value`` strings over it.

    Raises:
        InputError: whatever is wrong, by key and value.
    """
    _override(content, overrides)
    return validate(content)


def _override(content: dict[str, Any], overrides: Sequence[str]) -> None:
    for override in overrides:
        key, found, value = override.partition("=")
        if not found:
            raise InputError("override", override, "must have the form key.sub=value")
        put(content, key, _parse_yaml(value, f"override {key}"))


def _from_environment(content: dict[str, Any]) -> None:
    """Where a cluster's nodes are told the storage and the MLflow server, a recipe need not repeat them."""
    if "ESPALIER_STORAGE" in os.environ:
        content.setdefault("storage", os.environ["ESPALIER_STORAGE"])
    tracking = content.setdefault("tracking", {})
    if "MLFLOW_TRACKING_URI" in os.environ and isinstance(tracking, dict):
        tracking.setdefault("uri", os.environ["MLFLOW_TRACKING_URI"])


def validate(content: Mapping[str, Any]) -> Recipe:
    """A typed recipe.

    Raises:
        InputError: for the first thing that is wrong.
    """
    try:
        return Recipe.model_validate(content)
    except ValidationError as error:
        raise _one_line(error, Recipe) from None


def with_values(recipe: Recipe, values: Mapping[str, Any]) -> Recipe:
    """The recipe with some keys (``recovery.lr.peak``) changed."""
    content = recipe.model_dump(mode="json")
    for key, value in values.items():
        put(content, key, value)
    return validate(content)


def put(content: dict[str, Any], key: str, value: Any) -> None:
    """Set ``a.b.c`` in nested dictionaries."""
    *parents, last = key.strip().split(".")
    place = content
    for parent in parents:
        below = place.get(parent)
        if below is None:
            below = place[parent] = {}
        if not isinstance(below, dict):
            raise InputError("override", key, f"{parent} holds a value and has no keys below it")
        place = below
    place[last] = value


def get(content: Mapping[str, Any], key: str) -> Any:
    """Read ``a.b.c`` from nested dictionaries; ``None`` if it is not there."""
    place: Any = content
    for part in key.split("."):
        if not isinstance(place, Mapping) or part not in place:
            return None
        place = place[part]
    return place


def flatten(content: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dictionaries as ``a.b.c`` -> value."""
    flat: dict[str, Any] = {}
    for key, value in content.items():
        if isinstance(value, Mapping) and value:
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def single(recipe: Recipe, method: str) -> Recipe:
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
    """Recipes that come with espalier, by name (``demo``, ``dimap/swin_t_dimap2``)."""
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
    """YAML 1.1 reads 1e-4 as a string; people mean a number."""


_NumberLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"),
    list("-+0123456789."),
)


def _parse_yaml(text: str, where: str) -> Any:
    try:
        found = yaml.load(text, Loader=_NumberLoader)  # a SafeLoader: it builds plain values only
        _check_ends(found, set(), set())
        return found
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # 2001-99-99 is a ValueError
        reason = str(getattr(error, "problem", None) or error or type(error).__name__).splitlines()[0]
        mark = getattr(error, "problem_mark", None)
        line = f" in line {mark.line + 1}" if mark is not None else ""
        raise InputError("recipe", where, f"must be YAML ({reason}{line})") from None


def _check_ends(value: Any, above: set[int], known: set[int]) -> None:
    """An anchor can make a value part of itself: who goes through all of it would never end.

    Raises:
        ValueError: it does.
    """
    if not isinstance(value, (dict, list, tuple)) or id(value) in known:  # which may stand in many places
        return
    if id(value) in above:
        raise ValueError("a value holds itself")
    above.add(id(value))
    for one in value.values() if isinstance(value, dict) else value:
        _check_ends(one, above, known)
    above.remove(id(value))
    known.add(id(value))


# what pydantic calls the forms that a value of several may have
_BRANCH = re.compile(r"constrained-\w+|(literal|dict)\[.*\]")


def _no_branch(errors: Sequence[Any]) -> InputError:
    """A value that has none of the forms that its key allows."""
    path = [str(part) for part in errors[0]["loc"]]
    begin = next(number for number, part in enumerate(path) if _BRANCH.fullmatch(part))
    same = [one for one in errors if [str(part) for part in one["loc"]][:begin] == path[:begin]]
    table = [one for one in same if str(one["loc"][begin]).startswith("dict") and len(one["loc"]) > begin + 1]
    told = table[:1] or [one for one in same if not str(one["loc"][begin]).startswith("dict")]
    rest = [str(part) for part in told[0]["loc"][begin + 1 :]]
    says = dict.fromkeys(one["msg"].replace("Input should be", "must be") for one in told)
    return InputError(".".join(path[:begin] + rest), told[0].get("input"), ", or ".join(says))


def _one_line(error: ValidationError, kind: type[BaseModel]) -> InputError:
    """The first mistake that pydantic found, in our words."""
    errors = error.errors(include_url=False)
    if any(_BRANCH.fullmatch(str(part)) for part in errors[0]["loc"]):
        return _no_branch(errors)
    return _one_mistake(errors[0], kind)


def _one_mistake(first: Any, whole: type[BaseModel]) -> InputError:
    location = [part for part in first["loc"] if isinstance(part, str | int)]
    key = ".".join(map(str, location)) or "recipe"
    kind, given = first["type"], first.get("input")
    if kind == "extra_forbidden":
        choices = _fields_at(whole, location[:-1])
        return InputError(key, given, f"unknown key{did_you_mean(str(location[-1]), choices)}")
    if kind == "missing":
        return InputError(key, None, "is missing")
    if kind == "literal_error":
        expected = str((first.get("ctx") or {}).get("expected", ""))
        choices = re.findall(r"'([^']+)'", expected)
        return InputError(key, given, f"must be {expected}{did_you_mean(str(given), choices)}")
    if kind == "value_error":
        message = first["msg"].removeprefix("Value error, ")
        inner, found, rest = message.partition(": ")
        if found and re.fullmatch(r"[a-z_.]+", inner):
            return InputError(inner if key == "recipe" else f"{key}.{inner}", _shown(given, inner), rest)
        return InputError(key, None if isinstance(given, dict) else given, message)
    message = first["msg"].replace("Input should be", "must be")
    if kind == "too_short":
        message = f"must have at least {first['ctx']['min_length']} item"
    return InputError(key, given, message[0].lower() + message[1:])


def _shown(given: Any, key: str) -> Any:
    return get(given, key) if isinstance(given, dict) else None


def _fields_at(whole: type[BaseModel], location: Sequence[str | int]) -> list[str]:
    """Names of the keys that are known at a place of a recipe, or of a part of one."""
    model: Any = whole
    for part in location:
        if not (isinstance(model, type) and issubclass(model, BaseModel)) or part not in model.model_fields:
            return []
        annotation = model.model_fields[str(part)].annotation
        inner = [kind for kind in get_args(annotation) if isinstance(kind, type)]
        model = next((kind for kind in inner if issubclass(kind, BaseModel)), annotation)
    return list(model.model_fields) if isinstance(model, type) and issubclass(model, BaseModel) else []
