"""Structured pruning: channels, heads and neurons, their importance, and which layers share them."""

__all__ = [
    "channels",
    "dependency",
]
