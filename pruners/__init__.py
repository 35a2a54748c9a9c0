"""Pruning of vision transformers: weights in, weights and masks out. Needs torch, and nothing of a cluster.

>>> import timm, pruners
>>> model = timm.create_model("deit_small_patch16_224", pretrained=True)
>>> report = pruners.prune(model, "dimap", sparsity=0.5)
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

# Names are loaded when they are first used, so that the command line can raise an InputError
# without waiting for torch.
_HOME = {
    "Allocation": "allocation",
    "Costs": "costs",
    "EliminationOrder": "order",
    "InputError": "errors",
    "METHODS": "methods",
    "MaskSet": "masks",
    "PrunableLayer": "layers",
    "PruneReport": "one_shot",
    "Pruner": "base",
    "Scope": "allocation",
    "allocate": "allocation",
    "count_costs": "costs",
    "create_pruner": "methods",
    "find_layers": "layers",
    "Pattern": "patterns",
    "Sharing": "allocation",
    "fingerprint": "order",
    "prune": "one_shot",
}

if TYPE_CHECKING:
    from pruners.allocation import Allocation, Scope, Sharing, allocate
    from pruners.base import Pruner
    from pruners.costs import Costs, count_costs
    from pruners.errors import InputError
    from pruners.layers import PrunableLayer, find_layers
    from pruners.masks import MaskSet
    from pruners.methods import METHODS, create_pruner
    from pruners.one_shot import PruneReport, prune
    from pruners.order import EliminationOrder, fingerprint
    from pruners.patterns import Pattern

__all__ = [
    "METHODS",
    "Allocation",
    "Costs",
    "EliminationOrder",
    "InputError",
    "MaskSet",
    "Pattern",
    "PrunableLayer",
    "PruneReport",
    "Pruner",
    "Scope",
    "Sharing",
    "allocate",
    "count_costs",
    "create_pruner",
    "find_layers",
    "fingerprint",
    "prune",
]


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module 'pruners' has no attribute {name!r}")
    return getattr(importlib.import_module(f"pruners.{_HOME[name]}"), name)
