"""Images for training and evaluation: data sets, the Arrow store, augmentation, sampling, preprocessing."""

__all__ = [
    "arrow_store",
    "augment",
    "datasets",
    "digits",
    "node_cache",
    "preprocessing",
    "sampler",
]
