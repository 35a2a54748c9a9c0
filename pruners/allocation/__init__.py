"""Allocation: divide a budget of zeros among layers, within the bounds of each."""

__all__ = [
    "bounds",
    "projection",
    "sharing",
]
