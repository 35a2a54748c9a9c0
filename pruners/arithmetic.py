"""Integer arithmetic that several packages share."""

from __future__ import annotations


def ceil_div(numerator: int, denominator: int) -> int:
    """Divide two integers and round up, exactly: ``ceil_div(7, 3)`` is 3."""
    return -(-numerator // denominator)
