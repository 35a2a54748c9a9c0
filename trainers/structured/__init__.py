"""Narrower models: which shapes timm can hold, the cut, and the check of its result."""

__all__ = [
    "cut",
    "shapes",
    "verify",
]
