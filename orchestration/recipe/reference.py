"""Reference of a recipe's keys: values, default and meaning, read from the settings themselves."""

from __future__ import annotations

import types
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from rich.table import Table

from orchestration.recipe.dotted_keys import flatten
from orchestration.recipe.schema import OWN_DEFAULTS, Recipe
from pruners.errors import InputError, did_you_mean

_NAMES = {int: "integer", float: "number", str: "text", bool: "true, false", type(None): "null"}


@dataclass(frozen=True)
class Key:
    """A key of a recipe; ``default`` and ``values`` are in YAML. A key that must be given has no default."""

    name: str
    values: str
    default: str | None
    text: str


def recipe_keys(part: str = "") -> list[Key]:
    """The keys of a recipe at and below a key, in the order of the recipe.

    Raises:
        InputError: no recipe has such a key.
    """
    if not part:
        return list(_keys_of(Recipe, "", {}))
    known = list(_keys_of(Recipe, "", None))
    below = [key for key in known if key.name == part or key.name.startswith(f"{part}.")]
    if not below:
        names = {key.name for key in known} | {key.name.rpartition(".")[0] for key in known} - {""}
        raise InputError("key", part, f"no recipe has it{did_you_mean(part, sorted(names))}")
    return below


def as_table(keys: list[Key]) -> Table:
    """A row for each key."""
    table = Table("key", "default", "values", "meaning", box=None, pad_edge=False)
    for key in keys:
        default = "must be given" if key.default is None else key.default
        table.add_row(key.name, default, key.values, key.text)
    return table


def as_markdown(keys: list[Key]) -> str:
    """A section for each part of a recipe, with a table that has a row for each of its keys.

    Keys that have no others below them come first, together.

    Example:
        >>> print(as_markdown(recipe_keys("data.holdout")))
        ## `data`
        <BLANKLINE>
        | key | default | values | meaning |
        |---|---|---|---|
        | `data.holdout` | `0.1` | number | share of train held out where validation is not given |
    """
    parts: dict[str, list[Key]] = {"": []}
    names = {key.name for key in keys}
    for key in keys:
        part = key.name.partition(".")[0]
        alone = part == key.name and not any(name.startswith(f"{part}.") for name in names)
        parts.setdefault("" if alone else part, []).append(key)
    return "\n\n".join(
        f"## {f'`{part}`' if part else 'Top-level keys'}\n\n{_markdown_table(rows)}"
        for part, rows in parts.items()
        if rows
    )


def _markdown_table(keys: list[Key]) -> str:
    rows = ["| key | default | values | meaning |", "|---|---|---|---|"]
    for key in keys:
        default = {None: "must be given", "": "empty", "keys below": "keys below"}.get(
            key.default, f"`{key.default}`"
        )
        text = key.text.replace("|", "\\|")
        rows.append(f"| `{key.name}` | {default} | {key.values} | {text} |")
    return "\n".join(rows)


def _keys_of(
    settings: type[BaseModel], prefix: str, listed: dict[frozenset[str], str] | None
) -> Iterator[Key]:
    """List the keys of settings, parents before what is below them.

    Args:
        settings: the settings' class.
        prefix: goes before each key, as ``recovery.``.
        listed: settings that were listed already -> the key there; they are not listed again. ``None``: list
            all.
    """
    for name, field in settings.model_fields.items():
        key = f"{prefix}{field.alias or name}"
        inner = next((kind for kind in _choices(field.annotation) if _is_settings(kind)), None)
        if inner is None:
            yield _key(key, field)
            continue
        others = [kind for kind in _choices(field.annotation) if not _is_settings(kind)]
        first_key = None if listed is None else listed.setdefault(frozenset(inner.model_fields), key)
        if first_key not in (None, key):
            yield _key(key, field, f"its keys are those of {first_key}")
            continue
        if field.description or others or field.default is None:
            yield _key(key, field)
        own = _own_defaults(key, field)
        for below in _keys_of(inner, f"{key}.", listed):
            yield replace(below, default=_format_value(own[below.name])) if below.name in own else below


def _own_defaults(key: str, field: FieldInfo) -> dict[str, Any]:
    """The defaults that a field changes in settings of its type."""
    extra = field.json_schema_extra
    own = extra.get(OWN_DEFAULTS) if isinstance(extra, Mapping) else None
    if not isinstance(own, Mapping):
        return {}
    return {f"{key}.{name}": value for name, value in flatten(dict(own)).items()}


def _key(name: str, field: FieldInfo, more: str = "") -> Key:
    values = " or ".join(dict.fromkeys(map(_format_type, _choices(field.annotation))))
    default = None if field.is_required() else _format_value(field.get_default(call_default_factory=True))
    return Key(name, values, default, "; ".join(filter(None, (field.description, more))))


def _choices(annotation: Any) -> list[Any]:
    """The members of a union, without what limits them."""
    if hasattr(annotation, "__metadata__"):
        return _choices(annotation.__origin__)
    if get_origin(annotation) in (Union, types.UnionType):
        return [kind for member in get_args(annotation) for kind in _choices(member)]
    return [annotation]


def _is_settings(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def _format_type(annotation: Any) -> str:
    if _is_settings(annotation):
        return "keys below"
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return ", ".join(map(_format_value, inner))
    if origin is tuple:
        inner = tuple(kind for kind in inner if kind is not Ellipsis)
        return f"[{', '.join(dict.fromkeys(_any_of(kind) for kind in inner))}, …]"
    if origin is not None:
        return f"{{{': '.join(map(_any_of, inner))}, …}}"
    return _NAMES.get(annotation, "any")


def _any_of(annotation: Any) -> str:
    return " or ".join(dict.fromkeys(map(_format_type, _choices(annotation))))


def _format_value(value: Any) -> str:
    if isinstance(value, BaseModel):
        return "keys below"
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    if isinstance(value, tuple | list):
        return f"[{', '.join(map(_format_value, value))}]"
    return str(value)
