"""Errors in a recipe as one line: the key, the value, and what would be right."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ValidationError

from orchestration.recipe.dotted_keys import get
from orchestration.recipe.schema import Recipe
from pruners.errors import InputError, did_you_mean
from trainers.config.base import Settings

S = TypeVar("S", bound=Settings)


def validate(content: Mapping[str, Any]) -> Recipe:
    """Read a content as a typed recipe.

    Raises:
        InputError: for the first error, by key and value.
    """
    try:
        return Recipe.model_validate(content)
    except ValidationError as error:
        raise _one_line(error, Recipe) from None


# pydantic's names for the members of a union
_BRANCH = re.compile(r"constrained-\w+|(literal|dict)\[.*\]")


def _no_branch(errors: Sequence[Any]) -> InputError:
    """The error for a value that matches none of the types that its key allows."""
    path = [str(part) for part in errors[0]["loc"]]
    begin = next(number for number, part in enumerate(path) if _BRANCH.fullmatch(part))
    same = [mistake for mistake in errors if [str(part) for part in mistake["loc"]][:begin] == path[:begin]]
    table = [
        mistake
        for mistake in same
        if str(mistake["loc"][begin]).startswith("dict") and len(mistake["loc"]) > begin + 1
    ]
    shown = table[:1] or [mistake for mistake in same if not str(mistake["loc"][begin]).startswith("dict")]
    rest = [str(part) for part in shown[0]["loc"][begin + 1 :]]
    says = dict.fromkeys(mistake["msg"].replace("Input should be", "must be") for mistake in shown)
    return InputError(".".join(path[:begin] + rest), shown[0].get("input"), ", or ".join(says))


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
        inner, colon, rest = message.partition(": ")
        if colon and re.fullmatch(r"[a-z_.]+", inner):
            return InputError(inner if key == "recipe" else f"{key}.{inner}", _shown(given, inner), rest)
        return InputError(key, None if isinstance(given, dict) else given, message)
    message = first["msg"].replace("Input should be", "must be")
    if kind == "too_short":
        message = f"must have at least {first['ctx']['min_length']} item"
    return InputError(key, given, message[0].lower() + message[1:])


def _shown(given: Any, key: str) -> Any:
    return get(given, key) if isinstance(given, dict) else None


def _fields_at(whole: type[BaseModel], location: Sequence[str | int]) -> list[str]:
    """Names of the keys that are known at some level of a recipe, or of a part of a recipe."""
    model: Any = whole
    for part in location:
        if not (isinstance(model, type) and issubclass(model, BaseModel)) or part not in model.model_fields:
            return []
        annotation = model.model_fields[str(part)].annotation
        inner = [kind for kind in get_args(annotation) if isinstance(kind, type)]
        model = next((kind for kind in inner if issubclass(kind, BaseModel)), annotation)
    return list(model.model_fields) if isinstance(model, type) and issubclass(model, BaseModel) else []
