"""What others may read: no password, and no place of this machine."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_PLACE = re.compile(r"(?<![\w./~])(?:file:/{2,3}|~?/)(?!/)(?:[^\s/'\",:;()\[\]]+/)*(?=[^\s/'\",:;()\[\]])")
_LOGIN = re.compile(r"(?<=://)[^\s/@]+@")


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


def without_places(text: str) -> str:
    """A text for others, as an error's message: of paths in it the last part, of addresses no password."""
    return _PLACE.sub("", _LOGIN.sub("", text))
