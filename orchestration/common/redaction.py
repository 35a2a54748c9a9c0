"""Redaction of text for others: no credentials (:mod:`pruners.redaction`), and no path of this machine."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pruners.redaction import strip_credentials

_FOLDERS = re.compile(r"(?<![\w./~])(?:file:/{2,3}|~?/)(?!/)(?:[^\s/'\",:;()\[\]]+/)*(?=[^\s/'\",:;()\[\]])")
_URI = re.compile(r"[A-Za-z][\w.+-]*://(?:(?![A-Za-z][\w.+-]*://)[^\s'\"])+")


def redact(value: Any) -> Any:
    """Redact a recipe, or one of its values.

    Args:
        value: what JSON can hold, nested as it likes.

    Returns:
        The same with addresses without their credentials, and of each path of this machine the last part.
    """
    if isinstance(value, Mapping):
        return {key: redact(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [redact(item) for item in value]
    if not isinstance(value, str):
        return value
    local = value.startswith(("/", "~", "file:"))
    return Path(value).name if local else strip_credentials(value)


def strip_paths(text: str) -> str:
    """Redact a text, such as an error message: shorten paths to their last part, remove credentials.

    >>> strip_paths("cannot read /home/me/images/train.parquet")
    'cannot read train.parquet'
    """
    return _FOLDERS.sub("", _URI.sub(lambda match: strip_credentials(match[0]), text))
