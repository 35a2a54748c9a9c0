"""The cache folder of this node."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """The folder of this node's caches: ``$ESPALIER_CACHE``, or ``~/.cache/espalier``."""
    given = os.environ.get("ESPALIER_CACHE")
    return Path(given).expanduser() if given else Path.home() / ".cache" / "espalier"
