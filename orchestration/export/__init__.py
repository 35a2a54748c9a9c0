"""``espalier export`` and ``pull``: compressed checkpoints, and files for engines that are checked against
their model."""

__all__ = [
    "compress",
    "engine",
    "sample_images",
]
