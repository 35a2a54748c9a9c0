"""Second-order elimination (oViT): gradients, block-wise Fisher inverses, the order of elimination."""

__all__ = [
    "constraints",
    "damping",
    "fisher",
    "gradients",
    "kernels",
    "memory",
    "obs",
    "order",
]
