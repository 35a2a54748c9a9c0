"""Secrets in what is printed, logged or raised: logins of addresses, and keys in their queries."""

from __future__ import annotations

import re
from functools import cache

# before the first slash; or a password that has one in it and stands where a port would
_LOGIN = r"([A-Za-z][\w.+-]*)://(?:([^\s/@:'\"]*)(?::[^\s/@'\"]*)?@|[^\s/@:'\"]+:(?!\d*(?:[/?\s'\"]|$))[^\s@'\"]*@)"
# where what stands before the @ is a part of the place: Azure's container, Google's "anonymous", whose files
USER_STAYS = frozenset({"abfs", "abfss", "gs", "gcs", "hdfs", "viewfs"})
_QUERY = (
    r"([?&](?:[\w.-]*(?:secret|passw|token|signature|access_?key|account_?key|api_?key|credential)[\w.-]*|sig)=)"
    r"[^&\s'\"#]+"
)


def without_secrets(text: str) -> str:
    """The text without the logins of its addresses, and with ``***`` for secrets in their queries.

    >>> without_secrets("s3://key:secret@bucket/imagenet@2024?region=x: no such file")
    's3://bucket/imagenet@2024?region=x: no such file'
    """
    if "://" not in text:
        return _query().sub(r"\1***", text) if "=" in text else text
    return _query().sub(r"\1***", _login().sub(_without_login, text))


@cache  # compiled when needed: that takes longer than all else here
def _login() -> re.Pattern[str]:
    return re.compile(_LOGIN)


@cache
def _query() -> re.Pattern[str]:
    return re.compile(_QUERY, re.IGNORECASE)


def _without_login(found: re.Match[str]) -> str:
    scheme, user = found[1], found[2]
    return f"{scheme}://{user}@" if user and scheme.lower() in USER_STAYS else f"{scheme}://"
