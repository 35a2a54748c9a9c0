"""Structured pruning: channels, heads and neurons, their importance, and the layers that share them."""

__all__ = [
    "channels",
    "dependency",
]
