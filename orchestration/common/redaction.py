"""What others may read: no password, and no place of this machine."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pruners.redaction import USER_STAYS

_PLACE = re.compile(r"(?<![\w./~])(?:file:/{2,3}|~?/)(?!/)(?:[^\s/'\",:;()\[\]]+/)*(?=[^\s/'\",:;()\[\]])")
_URI = re.compile(r"[A-Za-z][\w.+-]*://(?:(?![A-Za-z][\w.+-]*://)[^\s'\"])+")
_SECRET = re.compile(r"(?<=[?&])[\w-]*(?:password|secret|token)[\w-]*=[^&#]*(?:&|$|(?=#))", re.IGNORECASE)
_DATABASES = ("postgresql", "mysql", "mssql", "oracle")


def without_password(uri: str) -> str:
    """The same place without a login and without secrets in its query; what has no ``://`` as it is.

    Only the authority, up to the first ``/``, holds a login: an ``@`` in a path is a part of its name.
    """
    scheme, separator, rest = uri.partition("://")
    if not separator:
        return uri
    begin = re.search(r"[/?#]", rest)
    end = begin.start() if begin else len(rest)
    authority, path = rest[:end], rest[end:]
    login, at, host = authority.rpartition("@")
    if not at and _is_cut_login(scheme, authority) and "@" in path:
        return without_password(f"{scheme}://{path.partition('@')[2]}")
    if at and scheme.lower() in USER_STAYS and (user := login.partition(":")[0]):
        host = f"{user}@{host}"
    place, question, query = path.partition("?")
    kept = _SECRET.sub("", f"?{query}").rstrip("&") if question else ""
    return f"{scheme}://{host}{place}{kept if kept != '?' else ''}"


def _is_cut_login(scheme: str, authority: str) -> bool:
    """Whether it is ``user:pass`` of a password with a slash: SQLAlchemy takes one; no port looks so."""
    if authority.startswith("["):  # an IPv6 address
        return False
    _, colon, port = authority.partition(":")
    return bool(colon) and (scheme.lower().startswith(_DATABASES) or not (port.isdigit() or not port))


def public(value: Any) -> Any:
    """A recipe, or one of its values, as others may read it: no password, of a path here the last part."""
    if isinstance(value, Mapping):
        return {key: public(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [public(one) for one in value]
    if not isinstance(value, str):
        return value
    local = value.startswith(("/", "~", "file:"))
    return Path(value).name if local else without_password(value)


def without_places(text: str) -> str:
    """A text for others, as an error's message: of paths in it the last part, of addresses no password."""
    return _PLACE.sub("", _URI.sub(lambda match: without_password(match[0]), text))
