"""Second-order elimination: gradients, block-wise Fisher inverses, the order of elimination (oViT)."""

__all__ = [
    "constraints",
    "damping",
    "fisher",
    "gradients",
    "kernels",
    "memory",
    "obs",
    "order",
    "updates",
]
