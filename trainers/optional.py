"""Libraries that only the extra ``deploy`` brings: asked for by name, in one line, where they are missing."""

from __future__ import annotations

from importlib.util import find_spec

from pruners.errors import InputError

EXTRA = "pip install 'espalier[deploy]'"


def missing(*packages: str) -> str | None:
    """What to say of the first of these packages that is not installed; ``None`` if all are."""
    for package in packages:
        if find_spec(package) is None:
            return f"needs {package}, which is not installed: {EXTRA}"
    return None


def require(key: str, value: object, *packages: str) -> None:
    """Raises:
    InputError: one of the packages is not installed; names it and the extra.
    """
    lacking = missing(*packages)
    if lacking is not None:
        raise InputError(key, value, lacking)
