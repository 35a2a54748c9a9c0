"""The pruning methods by name."""

from __future__ import annotations

from collections.abc import Callable

from pruners.base import Pruner
from pruners.dimap import Dimap
from pruners.errors import InputError, did_you_mean
from pruners.magnitude import Magnitude
from pruners.ovit import OViT

METHODS: dict[str, Callable[..., Pruner]] = {"dimap": Dimap, "magnitude": Magnitude, "ovit": OViT}


def create_pruner(name: str, **options: object) -> Pruner:
    """A method by name, with its options (``ovit``: ``block_size``, ``damp``).

    Raises:
        InputError: an unknown name.
    """
    if name not in METHODS:
        raise InputError(
            "method", name, f"must be one of {', '.join(sorted(METHODS))}{did_you_mean(name, METHODS)}"
        )
    return METHODS[name](**options)
