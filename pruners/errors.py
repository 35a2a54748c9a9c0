"""The error that bad input raises, everywhere in Espalier."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from pruners.redaction import strip_secrets

_LONGEST = 400  # characters of a value that a message shows
_TRACES = ("Traceback (most recent call last)", "ray::", "\x1b[36mray::")


class InputError(ValueError):
    """Input that cannot be used. It names the key, the value, and what would be right.

    The command line prints it as one line and exits with 2. In Python it is a ``ValueError``. Secrets in
    addresses are removed from its text, and a long value is cut.

    >>> str(InputError("sparsity", 1.5, "must lie between 0 and 1"))
    'sparsity = 1.5: must lie between 0 and 1'

    Args:
        key: the parameter, option or recipe key.
        value: what was given; ``None`` where nothing was, and the message then shows the key alone.
        expected: what would be right, as the end of a sentence that begins with the key.
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
        """Raise the errors of a block again, with the key that the caller knows.

        A library names its parameters, but a command or a recipe must name what its user wrote:

        >>> with InputError.renamed({"images": "--images"}):
        ...     raise InputError("images", 0, "must be positive")
        Traceback (most recent call last):
        ...
        pruners.errors.InputError: --images = 0: must be positive

        Args:
            keys: the caller's name for each key; other keys stay. Or a function that returns the error to
                raise, if the value or the text changes too.
            phrases: texts in the message and their replacements, made one after the other.

        Raises:
            InputError: the error of the block, renamed.
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


def check_share(key: str, value: float) -> None:
    """Check that a value is a share, 0 to 1.

    Raises:
        InputError: it is not.
    """
    if not 0.0 <= value <= 1.0:
        raise InputError(key, value, "must lie between 0 and 1")


def did_you_mean(value: str, choices: Iterable[str]) -> str:
    """Suggest the closest of some choices: ``" (did you mean 'x'?)"``, or ``""`` if none is close."""
    close = difflib.get_close_matches(value, list(choices), n=1, cutoff=0.6)
    return f" (did you mean {close[0]!r}?)" if close else ""


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message without secrets, or its class name if it has none.

    Some messages hold the traceback of another process (Ray's do). Its last line is returned then, which
    names the error itself.
    """
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return strip_secrets(lines[-1].strip() if lines[0].startswith(_TRACES) else lines[0])
