"""The one error that bad input raises, everywhere in Espalier."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

_TRACES = ("Traceback (most recent call last)", "ray::", "\x1b[36mray::")


class InputError(ValueError):
    """Input that cannot be used: names the key, the value, and what would be right.

    The command line prints it as one line and exits with 2; from Python it is a ``ValueError``.
    """

    def __init__(self, key: str, value: object, expected: str) -> None:
        self.key = key
        self.value = value
        self.expected = expected
        shown = key if value is None else f"{key} = {value!r}"
        super().__init__(" ".join(f"{shown}: {expected}".split()))

    def __reduce__(self) -> tuple[type[InputError], tuple[str, object, str]]:
        return type(self), (self.key, self.value, self.expected)


def did_you_mean(value: str, choices: Iterable[str]) -> str:
    """``" (did you mean 'x'?)"`` for the closest of ``choices``, or nothing if none is close."""
    close = difflib.get_close_matches(value, list(choices), n=1, cutoff=0.6)
    return f" (did you mean {close[0]!r}?)" if close else ""


def first_line(error: BaseException) -> str:
    """What an error says, as far as it fits on one line; its kind if it says nothing.

    Of one that tells another's trace (Ray's do) it is the end of it, where that one says what it is.
    """
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[-1].strip() if lines[0].startswith(_TRACES) else lines[0]
