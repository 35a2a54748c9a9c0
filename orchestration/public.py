"""What others may read: no password, and no place of this machine."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any


def without_password(uri: str) -> str:
    scheme, separator, rest = uri.partition("://")
    return f"{scheme}{separator}{rest.rpartition('@')[2]}" if separator else uri


def public(value: Any) -> Any:
    """A recipe, or one of its values, as others may read it: no password, of a path here the last part."""
    if isinstance(value, Mapping):
        return {key: public(one) for key, one in value.items()}
    if not isinstance(value, str):
        return value
    local = value.startswith(("/", "~", "file:"))
    return Path(value).name if local else without_password(value)
