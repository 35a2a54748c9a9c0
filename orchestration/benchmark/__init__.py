"""``espalier benchmark``: accuracy, size and latency of models and engines side by side."""

__all__ = [
    "images",
    "measure",
    "models",
    "options",
    "plot",
    "report",
    "run",
]
