"""Pruning of vision transformers: weights in, weights and masks out, without a cluster.

>>> import timm, pruners
>>> model = timm.create_model("deit_tiny_patch16_224")  # pretrained=True: with timm's weights
>>> report = pruners.prune(model, "dimap", sparsity=0.5)
>>> report.sparsity
0.5
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

# Names are loaded at their first use, so that the command line can raise an InputError without waiting for
# torch.
_MODULE_OF = {
    "Allocation": "allocation.sharing",
    "Costs": "model.costs",
    "EliminationOrder": "elimination.order",
    "InputError": "errors",
    "METHODS": "methods.registry",
    "MaskSet": "model.masks",
    "PrunableLayer": "model.layers",
    "PruneReport": "one_shot",
    "Pruner": "methods.base",
    "Scope": "allocation.sharing",
    "allocate": "allocation.sharing",
    "count_costs": "model.costs",
    "create_pruner": "methods.registry",
    "find_layers": "model.layers",
    "Pattern": "model.sparsity_pattern",
    "Sharing": "allocation.sharing",
    "fingerprint": "elimination.order",
    "prune": "one_shot",
}

if TYPE_CHECKING:
    from pruners.allocation.sharing import Allocation, Scope, Sharing, allocate
    from pruners.elimination.order import EliminationOrder, fingerprint
    from pruners.errors import InputError
    from pruners.methods.base import Pruner
    from pruners.methods.registry import METHODS, create_pruner
    from pruners.model.costs import Costs, count_costs
    from pruners.model.layers import PrunableLayer, find_layers
    from pruners.model.masks import MaskSet
    from pruners.model.sparsity_pattern import Pattern
    from pruners.one_shot import PruneReport, prune

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
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'pruners' has no attribute {name!r}")
    return getattr(importlib.import_module(f"pruners.{_MODULE_OF[name]}"), name)
