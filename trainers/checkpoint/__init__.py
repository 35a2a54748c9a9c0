"""Weights in folders and files: checkpoints, packed weights, training state, files of other projects."""

__all__ = [
    "checksums",
    "finite",
    "folder",
    "packed",
    "trainer_state",
]
