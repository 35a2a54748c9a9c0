"""Removes secrets from text that is printed, logged, stored or raised: logins and keys in addresses."""

from __future__ import annotations

import re
from functools import cache

# A login stands before the first slash. The second branch is a password with a slash in it, which stands
# where a port would.
_LOGIN = r"([A-Za-z][\w.+-]*)://(?:([^\s/@:'\"]*)(?::[^\s/@'\"]*)?@|[^\s/@:'\"]+:(?!\d*(?:[/?\s'\"]|$))[^\s@'\"]*@)"
# In these schemes the text before the @ is a part of the address, not a login: Azure's container, Google's
# "anonymous", the owner of files in HDFS.
_USER_STAYS = frozenset({"abfs", "abfss", "gs", "gcs", "hdfs", "viewfs"})
_QUERY = (
    r"([?&](?:[\w.-]*(?:secret|passw|token|signature|access_?key|account_?key|api_?key|credential)[\w.-]*|sig)=)"
    r"[^&\s'\"#]+"
)
# Fewer words than above: recipes are compared with stored ones, from which exactly these keys were removed.
_QUERY_OF_URI = r"(?<=[?&])[\w-]*(?:password|secret|token)[\w-]*=[^&#]*(?:&|$|(?=#))"
_DATABASES = ("postgresql", "mysql", "mssql", "oracle")


def strip_secrets(text: str) -> str:
    """Remove the logins of all addresses in a text, and replace secrets in their queries by ``***``.

    >>> strip_secrets("s3://key:secret@bucket/imagenet@2024?region=x: no such file")
    's3://bucket/imagenet@2024?region=x: no such file'
    """
    if "://" not in text:
        return _compiled(_QUERY).sub(r"\1***", text) if "=" in text else text
    return _compiled(_QUERY).sub(r"\1***", _compiled(_LOGIN).sub(_without_login, text))


def strip_credentials(uri: str) -> str:
    """Remove the login of an address, and the secrets in its query; a text without ``://`` is not changed.

    Only the authority, up to the first ``/``, can hold a login: an ``@`` in a path is a part of the path.

    >>> strip_credentials("http://me:secret@host:5000/mlflow?token=x&page=2")
    'http://host:5000/mlflow?page=2'
    """
    scheme, separator, rest = uri.partition("://")
    if not separator:
        return uri
    begin = re.search(r"[/?#]", rest)
    end = begin.start() if begin else len(rest)
    authority, path = rest[:end], rest[end:]
    login, at, host = authority.rpartition("@")
    if not at and _is_cut_login(scheme, authority) and "@" in path:
        return strip_credentials(f"{scheme}://{path.partition('@')[2]}")
    if at and scheme.lower() in _USER_STAYS and (user := login.partition(":")[0]):
        host = f"{user}@{host}"
    path, question, query = path.partition("?")
    kept = _compiled(_QUERY_OF_URI).sub("", f"?{query}").rstrip("&") if question else ""
    return f"{scheme}://{host}{path}{kept if kept != '?' else ''}"


@cache  # compiled at first use: compiling takes longer than everything else in this module
def _compiled(pattern: str) -> re.Pattern[str]:
    return re.compile(pattern, 0 if pattern is _LOGIN else re.IGNORECASE)


def _without_login(match: re.Match[str]) -> str:
    scheme, user = match[1], match[2]
    return f"{scheme}://{user}@" if user and scheme.lower() in _USER_STAYS else f"{scheme}://"


def _is_cut_login(scheme: str, authority: str) -> bool:
    """Return whether an authority is the first part of ``user:pass`` where the password holds a slash.

    SQLAlchemy accepts such passwords, and no port looks like one.
    """
    if authority.startswith("["):  # an IPv6 address
        return False
    _, colon, port = authority.partition(":")
    return bool(colon) and (scheme.lower().startswith(_DATABASES) or not (port.isdigit() or not port))
