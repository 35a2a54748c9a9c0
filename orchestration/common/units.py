"""Numbers with their units, as people read them."""

from __future__ import annotations


def percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.2f} %"


def count(value: int) -> str:
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.2f} {letter}"
    return str(value)


def megabytes(size: int | None) -> str:
    return "–" if size is None else f"{size / 1e6:.2f} MB"
