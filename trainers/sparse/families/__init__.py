"""timm's models as programs: one module for each family."""

__all__ = [
    "swin",
    "tensors",
    "vision_transformer",
]
