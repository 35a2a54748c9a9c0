"""Options and arguments that several commands have."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import click

F = TypeVar("F", bound=Callable[..., Any])

DEFAULT_STORAGE = "runs"

overrides = click.argument("overrides", nargs=-1, metavar="[KEY.SUB=VALUE]...")


def storage(help_text: str) -> Callable[[F], F]:
    """``--storage``, or ``ESPALIER_STORAGE``."""
    return click.option(
        "--storage", default=DEFAULT_STORAGE, show_default=True, envvar="ESPALIER_STORAGE", help=help_text
    )


storage_to_look_at = storage("Storage of the sweeps to look at.")
