"""A model as a pruner sees it: prunable layers, sparsity patterns, masks, costs."""

__all__ = [
    "costs",
    "families",
    "layers",
    "left_dense",
    "masks",
    "sparsity_pattern",
]
