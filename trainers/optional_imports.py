"""Optional libraries, most of them of the extra ``deploy``: check for them, import them, silence them."""

from __future__ import annotations

import io
import logging
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from functools import cache
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import Any

from pruners.errors import InputError

EXTRA = "pip install 'espalier[deploy]'"


def missing(*packages: str) -> str | None:
    """An error message for the first of these packages that is not installed; ``None`` if all are."""
    for package in packages:
        if find_spec(package) is None:
            return f"needs {package}, which is not installed: {EXTRA}"
    return None


def import_openvino() -> Any:
    """Import OpenVINO without its telemetry package, by which it and NNCF report usage."""
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]  # importing it then fails
    return import_module("openvino")


@cache
def openvino_core() -> Any:
    """The only ``Core`` of a process.

    On processors with AVX-512 the CPU plug-in installs a signal stack for each ``Core``. The first one that
    is deleted frees the stack that the others still use, and the next signal ends the process.
    """
    return import_openvino().Core()


def require(key: str, value: object, *packages: str) -> None:
    """Check that packages are installed.

    Args:
        key: the option or recipe key that needs them, for the error message.
        value: its value.
        packages: names of the packages, as they are imported.

    Raises:
        InputError: one of the packages is not installed; names it and the extra.
    """
    lacking = missing(*packages)
    if lacking is not None:
        raise InputError(key, value, lacking)


def installed(*packages: str) -> dict[str, str]:
    """The versions of those packages that are installed."""
    versions = {}
    for package in packages:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return versions


@contextmanager
def quietly() -> Iterator[None]:
    """Suppress logs, warnings and progress bars of libraries that convert models, in a ``with`` block."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
