"""Models: built by timm, from a hub, or from a file of weights of another training script."""

__all__ = [
    "factory",
    "private_apis",
    "transformers_names",
    "weights_file",
]
