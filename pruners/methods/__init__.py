"""The pruning methods, one module each, and the table that registers them."""

__all__ = [
    "base",
    "dimap",
    "magnitude",
    "ovit",
    "registry",
    "second_order",
    "woodfisher",
]
