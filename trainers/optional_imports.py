"""Libraries that may be there or not, and that talk: most of them only the extra ``deploy`` brings."""

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
    """What to say of the first of these packages that is not installed; ``None`` if all are."""
    for package in packages:
        if find_spec(package) is None:
            return f"needs {package}, which is not installed: {EXTRA}"
    return None


def import_openvino() -> Any:
    """OpenVINO without the reports that it and NNCF send home by a package that both can do without."""
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]  # importing it then fails
    return import_module("openvino")


@cache
def openvino_core() -> Any:
    """The one ``Core`` of a process.

    On processors with AVX-512 its CPU plug-in gives each of several a signal stack; the first to go takes the
    one that the others are still on, and the next signal ends the process.
    """
    return import_openvino().Core()


def require(key: str, value: object, *packages: str) -> None:
    """Raises:
    InputError: one of the packages is not installed; names it and the extra.
    """
    lacking = missing(*packages)
    if lacking is not None:
        raise InputError(key, value, lacking)


def installed(*packages: str) -> dict[str, str]:
    """The versions of those packages that are installed."""
    found = {}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


@contextmanager
def quietly() -> Iterator[None]:
    """Without what the libraries that convert models have to say: remarks, warnings, bars."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
