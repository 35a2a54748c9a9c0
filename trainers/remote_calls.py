"""Calls to remote file systems that Ctrl-C can interrupt, with a time limit if one is set.

The clients of object stores run compiled code, which retries for minutes and does not react to signals. A
call therefore runs in a thread of its own; when its time is up, the thread is left behind and not waited for.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")
LIMIT_SECONDS = 20.0
"""Seconds that a command waits for a remote file system before it gives up."""


class _State:
    """The state of the remote calls of this process.

    Attributes:
        limit: seconds that a call may take; ``None``: as many as it needs.
        silent: schemes with hosts or buckets (``s3://bucket``) that have not answered in time.
        abandoned: whether a thread may still wait for an answer.
    """

    limit: float | None = None
    silent: set[str]
    abandoned: bool = False

    def __init__(self) -> None:
        self.silent = set()


_state = _State()


@contextmanager
def time_limit(seconds: float | None) -> Iterator[None]:
    """Limit the seconds of :func:`call_limited` in a ``with`` block; ``None``: no limit, as in a sweep."""
    before, _state.limit = _state.limit, seconds
    try:
        yield
    finally:
        _state.limit = before


def call_limited(uri: str, function: Callable[P, T], *args: P.args, **options: P.kwargs) -> T:
    """Call a function that asks a remote file system, within the limit of :func:`time_limit`.

    Args:
        uri: what is asked; for a local path the function is called directly.
        function: called with ``args`` and ``options``.

    Returns:
        What the function returns.

    Raises:
        TimeoutError: no answer in time, now or at an earlier call to the same host or bucket.
        OSError: whatever the function raises.
    """
    if not is_remote(uri) or _state.limit is None:
        return function(*args, **options)
    authority = _authority(uri)
    if authority in _state.silent:
        raise TimeoutError("did not answer before")
    return _wait(authority, _state.limit, lambda: function(*args, **options))


def call_interruptible(uri: str, function: Callable[P, T], *args: P.args, **options: P.kwargs) -> T:
    """Call a function without a time limit, so that Ctrl-C interrupts it: for reading much from ``uri``.

    Args:
        uri: what is read; for a local path, or outside the main thread, the function is called directly.
        function: called with ``args`` and ``options``.

    Returns:
        What the function returns.
    """
    if not is_remote(uri) or threading.current_thread() is not threading.main_thread():
        return function(*args, **options)
    return _wait(_authority(uri), None, lambda: function(*args, **options))


def any_abandoned() -> bool:
    """Return whether the thread of an abandoned call may still run; an ordinary exit would wait for it."""
    return _state.abandoned


def is_remote(uri: str) -> bool:
    """Return whether a path or URI lies on another machine."""
    return "://" in uri and not uri.startswith("file://")


def _authority(uri: str) -> str:
    """Scheme and host or bucket of a URI: ``s3://bucket``."""
    scheme, _, rest = uri.partition("://")
    return f"{scheme}://{rest.partition('/')[0]}"


def run_in_thread(work: Callable[[], T]) -> Future[T]:
    """Run ``work`` in a daemon thread, for which an exit of Python does not wait."""
    result: Future[T] = Future()

    def body() -> None:
        try:
            result.set_result(work())
        except BaseException as error:
            result.set_exception(error)

    threading.Thread(target=body, daemon=True).start()
    return result


def _wait(authority: str, seconds: float | None, work: Callable[[], T]) -> T:
    result = run_in_thread(work)
    try:
        return result.result(seconds)
    except TimeoutError:
        if result.done():  # raised by the function itself
            raise
        _state.abandoned = True
        _state.silent.add(authority)
        raise TimeoutError(f"no answer in {seconds:g} seconds") from None
    except KeyboardInterrupt:
        _state.abandoned = not result.done() or _state.abandoned
        raise
