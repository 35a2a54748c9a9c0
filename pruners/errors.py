"""The one error that bad input raises, everywhere in Espalier."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from pruners.redaction import without_secrets

_LONGEST = 400  # of a value, in letters
_TRACES = ("Traceback (most recent call last)", "ray::", "\x1b[36mray::")


class InputError(ValueError):
    """Input that cannot be used: names the key, the value, and what would be right.

    The command line prints it as one line and exits with 2; from Python it is a ``ValueError``. Its text
    holds no secret of an address, and of a long value the beginning.
    """

    def __init__(self, key: str, value: object, expected: str) -> None:
        self.key = key
        self.value = value
        self.expected = without_secrets(expected)
        shown = key if value is None else f"{key} = {_shown(value)}"
        super().__init__(without_secrets(" ".join(f"{shown}: {expected}".split())))

    def __reduce__(self) -> tuple[type[InputError], tuple[str, object, str]]:
        return type(self), (self.key, self.value, self.expected)


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}…"


def did_you_mean(value: str, choices: Iterable[str]) -> str:
    """``" (did you mean 'x'?)"`` for the closest of ``choices``, or nothing if none is close."""
    close = difflib.get_close_matches(value, list(choices), n=1, cutoff=0.6)
    return f" (did you mean {close[0]!r}?)" if close else ""


def first_line(error: BaseException) -> str:
    """What an error says, as far as it fits on one line, without secrets; its kind if it says nothing.

    Of one that tells another's trace (Ray's do) it is the end of it, where that one says what it is.
    """
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return without_secrets(lines[-1].strip() if lines[0].startswith(_TRACES) else lines[0])
