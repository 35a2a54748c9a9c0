"""Checks of a recipe before anything starts: data, model, layers, budget, storage, tracking; its plan."""

__all__ = [
    "allocation",
    "checks",
    "data",
    "deploy",
    "plan",
    "start",
    "training",
]
