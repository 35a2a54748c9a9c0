"""Values of nested mappings by dotted keys, as recipes and the command line write them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pruners.errors import InputError
from trainers.config.base import Settings, flatten

__all__ = ["flatten", "get", "put"]


def put(content: dict[str, Any], key: str, value: Any) -> None:
    """Set ``a.b.c`` in nested dictionaries; levels that are missing are made.

    Args:
        content: the dictionary, changed in place.
        key: the dotted key.
        value: what is set.

    Raises:
        InputError: a level above the last holds a value, and no dictionary.
    """
    *parents, last = key.strip().split(".")
    level = content
    for parent in parents:
        below = level.get(parent)
        if below is None:
            below = level[parent] = {}
        if not isinstance(below, dict):
            raise InputError("override", key, f"{parent} holds a value and has no keys below it")
        level = below
    level[last] = value


def get(content: Mapping[str, Any] | Settings, key: str) -> Any:
    """Read ``a.b.c`` from nested dictionaries or settings; ``None`` if there is no such key."""
    level: Any = content
    for part in key.split("."):
        if isinstance(level, Settings):
            level = getattr(level, part, None)
        elif isinstance(level, Mapping) and part in level:
            level = level[part]
        else:
            return None
    return level
