"""The table of pruning methods: the one place where a method is registered.

Recipes, the command line and the tests read :data:`METHODS`. Nothing here needs torch, so that a recipe
is checked and ``--help`` is printed at once; a method's module is imported when it is created.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

from pruners.errors import InputError, did_you_mean

if TYPE_CHECKING:
    from pruners.methods.base import Pruner


@dataclass(frozen=True)
class MethodSpec:
    """The description of a method, known before its code is loaded.

    Attributes:
        name: its name in recipes, on the command line and in reports.
        module: the module of :mod:`pruners.methods` that holds its class.
        class_name: the class, which keeps the protocol :class:`pruners.methods.base.Pruner`.
        second_order: whether it needs gradients, and so training images.
        summary: one sentence that says how it chooses the weights.
    """

    name: str
    module: str
    class_name: str
    second_order: bool
    summary: str

    def load(self) -> Callable[..., Pruner]:
        """Import the method's module, and return its class."""
        module = importlib.import_module(f"pruners.methods.{self.module}")
        return cast("Callable[..., Pruner]", getattr(module, self.class_name))


_SPECS = (
    MethodSpec("dimap", "dimap", "Dimap", False, "Share of a layer's energy, one threshold per module."),
    MethodSpec("lamp", "dimap", "Lamp", False, "The score of DIMAP, one threshold for the model."),
    MethodSpec("magnitude", "magnitude", "Magnitude", False, "Smallest weights, the same share per layer."),
    MethodSpec("magnitude_global", "magnitude", "GlobalMagnitude", False, "Smallest weights of the model."),
    MethodSpec("ovit", "ovit", "OViT", True, "Optimal Brain Surgeon in Fisher blocks, weight by weight."),
    MethodSpec("ovit_fast", "ovit", "OViTFast", True, "oViT with few gradients and a relative damping."),
    MethodSpec("dimap+ovit", "ovit", "DimapOViT", True, "DIMAP allocates sparsities, oViT chooses weights."),
    MethodSpec("woodfisher", "woodfisher", "WoodFisher", True, "Fisher blocks, all weights judged at once."),
)

METHODS: dict[str, MethodSpec] = {spec.name: spec for spec in _SPECS}
"""Every pruning method by its name."""

SECOND_ORDER = frozenset(name for name, spec in METHODS.items() if spec.second_order)
"""The names of the methods that need gradients."""


def create_pruner(name: str, **options: object) -> Pruner:
    """Create a pruning method by its name.

    >>> create_pruner("ovit", block_size=64, pattern="2:4").name
    'ovit'

    Args:
        name: one of :data:`METHODS`.
        options: arguments of the method's class: ``pattern`` of every method, ``block_size``, ``damp``,
            ``gradients`` and so on of those with a Fisher.

    Returns:
        The pruner, ready for :func:`pruners.prune`.

    Raises:
        InputError: an unknown name, or an option that the method does not have.
    """
    if name not in METHODS:
        raise InputError(
            "method", name, f"must be one of {', '.join(sorted(METHODS))}{did_you_mean(name, METHODS)}"
        )
    try:
        return METHODS[name].load()(**options)
    except TypeError as error:
        raise InputError("method", name, f"has no such option ({error})") from None
