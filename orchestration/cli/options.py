"""Options and arguments that several commands have, and a helper to run long commands."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, TypeVar

import click

from orchestration.common import defaults
from orchestration.common.environment import INTERRUPTED

if TYPE_CHECKING:
    from rich.status import Status

    from trainers.sources.columns import Columns

F = TypeVar("F", bound=Callable[..., Any])

overrides = click.argument("overrides", nargs=-1, metavar="[KEY.SUB=VALUE]...")
layers = click.option(
    "--layers", multiple=True, metavar="MODULE=REGEX", help="Default: by the model's family; repeatable."
)
seed = click.option(
    "--seed",
    default=defaults.SEED,
    show_default=True,
    type=click.IntRange(min=0),
    help="Of all that is drawn at random.",
)


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


def print_result(text: str, work: Callable[[Status], Iterable[str]]) -> None:
    """Show a status line during ``work``, then print the lines that it returns; Ctrl-C ends at once.

    Args:
        text: of the status line.
        work: does the work. It stops the status line before it shows its own progress, and makes its imports
            itself, so that the line is shown before them.
    """
    from orchestration.common.terminal import Console

    try:
        with Console(stderr=True).status(text) as status:
            lines = work(status)
    except KeyboardInterrupt:
        from orchestration.commands.progress import leave

        leave(INTERRUPTED)
    for line in lines:
        click.echo(line)
