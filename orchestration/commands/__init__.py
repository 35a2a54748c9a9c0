"""The work of the commands for one model: prune, finetune, quantize, inspect, evaluate, import."""

__all__ = [
    "evaluate",
    "finetune",
    "import_weights",
    "inspect",
    "model_source",
    "output",
    "progress",
    "prune",
    "prune_options",
    "quantize",
    "registry",
    "training_options",
]
