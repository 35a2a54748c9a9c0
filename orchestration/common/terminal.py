"""The console on which all output is printed; it shows text unchanged."""

from __future__ import annotations

from typing import Any

from rich.console import Console as AnyConsole
from rich.console import RenderableType
from rich.status import Status
from rich.text import Text


class Console(AnyConsole):
    """rich's console without markup and emoji.

    Text from elsewhere (errors, paths, names of layers) may hold ``[x]``, ``[/x]`` or ``:key:``, which rich
    would drop, fail at, or draw as a picture. A column of a progress bar needs ``markup=False`` too.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"markup": False, "emoji": False, **options})

    def status(self, status: RenderableType, **options: Any) -> Status:
        return super().status(Text(status) if isinstance(status, str) else status, **options)


def output_console(width: int) -> Console:
    """A console on standard output: as wide as the terminal, or ``width`` letters where there is none."""
    console = Console()
    return console if console.is_terminal else Console(width=width)
