"""Searches of MLflow's client, which answers page by page."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

PAGE = 1000  # the most that MLflow gives at once of models and runs


def all_pages(search: Callable[..., Any], *arguments: Any) -> list[Any]:
    """Read all pages of an MLflow search.

    Do not change what it searches until all pages are read (do not delete runs, or change a status that the
    search asks for): pages are offsets.
    """
    items: list[Any] = []
    token: str | None = None
    while True:
        page = search(*arguments, max_results=PAGE, page_token=token)
        items += page
        token = page.token
        if not token:
            return items
