"""How many zeros each layer gets: a budget divided among layers, within the bounds of each."""

__all__ = [
    "bounds",
    "projection",
    "sharing",
]
