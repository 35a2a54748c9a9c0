"""Searches of MLflow's client, which answers page by page."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

PAGE = 1000  # the most that MLflow gives at once of models and runs


def all_pages(search: Callable[..., Any], *arguments: Any) -> list[Any]:
    """Everything that a search of a client finds.

    Its pages are places in an order: what changes the order (runs deleted, or given another status that the
    search asks for) must wait until all are read.
    """
    items: list[Any] = []
    token: str | None = None
    while True:
        page = search(*arguments, max_results=PAGE, page_token=token)
        items += page
        token = page.token
        if not token:
            return items
