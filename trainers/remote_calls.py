"""Looks at remote places: each has a limit of seconds where one is set, and Ctrl-C is heard in its middle.

What object stores' clients do is done in compiled code, which tries for minutes and hears no signal; so it is
done in a thread of its own, which is left to itself when its time is up.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")
SECONDS = 20.0


class _State:
    """Of this process."""

    limit: float | None = None
    silent: set[str]  # places that have not answered
    left: bool = False  # whether a thread still waits for an answer

    def __init__(self) -> None:
        self.silent = set()


_state = _State()


@contextmanager
def limited(seconds: float | None) -> Iterator[None]:
    """Looks have so many seconds meanwhile; ``None``: as many as they need, as in a sweep that is at work."""
    before, _state.limit = _state.limit, seconds
    try:
        yield
    finally:
        _state.limit = before


def look(place: str, function: Callable[P, T], *args: P.args, **options: P.kwargs) -> T:
    """What a function answers that asks a remote ``place``; a local one is asked without more ado.

    Raises:
        TimeoutError: it did not answer in time, or had not when it was asked before; an ``OSError``.
    """
    if not is_remote(place) or _state.limit is None:
        return function(*args, **options)
    name = _authority(place)
    if name in _state.silent:
        raise TimeoutError("did not answer before")
    return _wait(name, _state.limit, lambda: function(*args, **options))


def heard(place: str, function: Callable[P, T], *args: P.args, **options: P.kwargs) -> T:
    """The same without a limit, for what reads much of a place that has answered: Ctrl-C is heard."""
    if not is_remote(place) or threading.current_thread() is not threading.main_thread():
        return function(*args, **options)
    return _wait(_authority(place), None, lambda: function(*args, **options))


def abandoned() -> bool:
    """Whether a look was given up whose thread may still wait: an ordinary end would wait for it too."""
    return _state.left


def is_remote(place: str) -> bool:
    return "://" in place and not place.startswith("file://")


def _authority(place: str) -> str:
    scheme, _, rest = place.partition("://")
    return f"{scheme}://{rest.partition('/')[0]}"


def in_thread(work: Callable[[], T]) -> Future[T]:
    """What ``work`` comes to, in a thread of its own, which cannot be ended and is not waited for."""
    result: Future[T] = Future()

    def body() -> None:
        try:
            result.set_result(work())
        except BaseException as error:
            result.set_exception(error)

    threading.Thread(target=body, daemon=True).start()
    return result


def _wait(name: str, seconds: float | None, work: Callable[[], T]) -> T:
    result = in_thread(work)
    try:
        return result.result(seconds)
    except TimeoutError:
        if result.done():  # the function's own
            raise
        _state.left = True
        _state.silent.add(name)
        raise TimeoutError(f"no answer in {seconds:g} seconds") from None
    except KeyboardInterrupt:
        _state.left = True
        raise
