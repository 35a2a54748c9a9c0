"""Options and arguments that several commands have."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import click

from orchestration.common import defaults

if TYPE_CHECKING:
    from trainers.sources.columns import Columns

F = TypeVar("F", bound=Callable[..., Any])

overrides = click.argument("overrides", nargs=-1, metavar="[KEY.SUB=VALUE]...")


def storage(help_text: str) -> Callable[[F], F]:
    """``--storage``, or ``ESPALIER_STORAGE``."""
    return click.option(
        "--storage", default=defaults.STORAGE, show_default=True, envvar="ESPALIER_STORAGE", help=help_text
    )


storage_to_look_at = storage("Storage of the sweeps to look at.")


def columns(command: F) -> F:
    """``--image-column`` and ``--label-column``, for tables whose metadata does not say which are meant."""
    usual = "Default: the one {} of the hub's metadata, or '{}'."
    image = click.option("--image-column", metavar="NAME", help=usual.format("Image", "image"))
    label = click.option("--label-column", metavar="NAME", help=usual.format("ClassLabel", "label"))
    return image(label(command))


def named(options: dict[str, Any]) -> Columns:
    """The columns that :func:`columns` was given, taken out of a command's options."""
    from trainers.sources.columns import Columns

    return Columns(options.pop("image_column"), options.pop("label_column"))
