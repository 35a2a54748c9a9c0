"""The pruning methods by name."""

from __future__ import annotations

from collections.abc import Callable

from pruners.errors import InputError, did_you_mean
from pruners.methods.base import Pruner
from pruners.methods.dimap import Dimap, Lamp
from pruners.methods.magnitude import GlobalMagnitude, Magnitude
from pruners.methods.ovit import DimapOViT, OViT, OViTFast
from pruners.methods.woodfisher import WoodFisher

METHODS: dict[str, Callable[..., Pruner]] = {
    "dimap": Dimap,
    "dimap+ovit": DimapOViT,
    "lamp": Lamp,
    "magnitude": Magnitude,
    "magnitude_global": GlobalMagnitude,
    "ovit": OViT,
    "ovit_fast": OViTFast,
    "woodfisher": WoodFisher,
}


def create_pruner(name: str, **options: object) -> Pruner:
    """A method by name, with its options (``pattern``; ``block_size``, ``damp`` … of those with a Fisher).

    Raises:
        InputError: an unknown name, or an option that the method does not have.
    """
    if name not in METHODS:
        raise InputError(
            "method", name, f"must be one of {', '.join(sorted(METHODS))}{did_you_mean(name, METHODS)}"
        )
    try:
        return METHODS[name](**options)
    except TypeError as error:
        raise InputError("method", name, f"has no such option ({error})") from None
