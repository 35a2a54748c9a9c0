"""``espalier export`` and ``pull``: files for engines, checked against the model they come from."""

__all__ = [
    "compress",
    "engine",
    "sample_images",
]
