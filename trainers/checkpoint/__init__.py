"""Checkpoint folders: weights, masks, records, checksums, packed weights, state of training."""

__all__ = [
    "checksums",
    "finite",
    "folder",
    "packed",
    "records",
    "trainer_state",
]
