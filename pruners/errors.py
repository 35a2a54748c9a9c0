"""The one error that bad input raises, everywhere in Espalier."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from pruners.redaction import strip_secrets

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
        self.expected = strip_secrets(expected)
        shown = key if value is None else f"{key} = {_shown(value)}"
        super().__init__(strip_secrets(" ".join(f"{shown}: {expected}".split())))

    @staticmethod
    @contextmanager
    def renamed(
        keys: Mapping[str, str] | Callable[[InputError], InputError], phrases: Mapping[str, str] | None = None
    ) -> Iterator[None]:
        """Errors of the block, raised again in the words of its caller.

        A library names its parameters; a command or a recipe names what its user wrote:

        >>> with InputError.renamed({"images": "--images"}):
        ...     raise InputError("images", 0, "must be positive")
        Traceback (most recent call last):
        ...
        pruners.errors.InputError: --images = 0: must be positive

        Args:
            keys: the caller's word for a key; a key that is not in it stays. Or a function that returns the
                error to raise, where the value or the text changes too.
            phrases: text of the message -> what stands there instead, replaced one after the other.

        Raises:
            InputError: that of the block, renamed.
        """
        try:
            yield
        except InputError as error:
            by_key = keys if callable(keys) else _by_key(keys)
            renamed = by_key(error)
            for old, new in (phrases or {}).items():
                renamed = renamed.replaced(expected=renamed.expected.replace(old, new))
            if renamed is error:
                raise
            raise renamed from None

    def replaced(self, **parts: Any) -> InputError:
        """A copy with another ``key``, ``value`` or ``expected``."""
        return InputError(**{"key": self.key, "value": self.value, "expected": self.expected, **parts})

    def __reduce__(self) -> tuple[type[InputError], tuple[str, object, str]]:
        return type(self), (self.key, self.value, self.expected)


def _by_key(keys: Mapping[str, str]) -> Callable[[InputError], InputError]:
    return lambda error: error.replaced(key=keys[error.key]) if error.key in keys else error


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
    return strip_secrets(lines[-1].strip() if lines[0].startswith(_TRACES) else lines[0])
