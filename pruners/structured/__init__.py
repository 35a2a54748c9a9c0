"""Whole channels, heads and neurons: their importance, and what depends on what."""

__all__ = [
    "channels",
    "dependency",
]
