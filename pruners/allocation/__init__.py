"""How many zeros each layer gets: a budget shared among layers, within the bounds of each."""

__all__ = [
    "bounds",
    "projection",
    "sharing",
]
