"""The pruning methods, one file each, and the table that they are registered in."""

__all__ = [
    "base",
    "dimap",
    "magnitude",
    "ovit",
    "registry",
    "second_order",
    "woodfisher",
]
