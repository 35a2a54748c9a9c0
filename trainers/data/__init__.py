"""Images on their way to the model: datasets, the Arrow store, augmentation, sampling, preprocessing."""

__all__ = [
    "arrow_store",
    "augment",
    "datasets",
    "digits",
    "node_cache",
    "preprocessing",
    "sampler",
]
