"""A page of the documentation, run as its reader would: block by block, in the folder where the test is."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parents[2] / "docs"
_BLOCK = re.compile(
    r"^```(python|bash|text|\{code-block\} yaml)\n(?::caption: (\S+)\n\n)?(.*?)^```",
    re.DOTALL | re.MULTILINE,
)
_FIGURE = re.compile(r"\d[\d.,:]*")
_LINE = re.compile(r"[─━]+")
_CHOICE = re.compile(r"\b(own|searched) ")  # of allocations: whichever was the better one


@dataclass
class Page:
    """A page as it runs.

    Attributes:
        names: what its Python has defined.
        printed: what its blocks have printed, one text each.
    """

    names: dict[str, Any] = field(default_factory=dict)
    printed: list[str] = field(default_factory=list)


def run_page(name: str, command: Callable[[list[str]], None], read: Callable[[], str]) -> Page:
    """Run Python and commands from top to bottom, and compare what they print with what the page shows.

    A block of YAML with a file's name as its caption becomes that file. A block of text shows lines of what
    the block before it printed, in their order; ``…`` stands for others. Figures may be different ones.

    Args:
        name: the page, below ``docs``.
        command: runs ``espalier`` with these arguments.
        read: gives what was printed since it was called last.
    """
    page = Page()
    for language, caption, code in _BLOCK.findall((DOCS / name).read_text(encoding="utf-8")):
        if language == "text":
            check_shown(code, page.printed[-1])
        elif caption:
            Path(caption).write_text(code, encoding="utf-8")
        elif language == "python":
            exec(compile(code, name, "exec"), page.names)
            page.printed.append(read())
        else:
            for line in code.splitlines():
                words = shlex.split(line, comments=True)
                assert words[0] == "espalier"
                command(words[1:])
            page.printed.append(read())
    return page


def check_shown(shown: str, printed: str) -> None:
    """Each line that is shown was printed, figures aside, in this order."""
    lines = iter([shape(line) for line in printed.splitlines()])
    for line in shown.splitlines():
        if line.strip() != "…":
            assert shape(line) in lines, f"{line!r} is not (or not here) in\n{printed}"


def shape(line: str) -> str:
    """A line without its figures, its widths and its choices."""
    masked = _LINE.sub("─", _FIGURE.sub("0", line))
    return " ".join(_CHOICE.sub("own ", f"{masked} ").split())
