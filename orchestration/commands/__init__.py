"""What the commands for one model do: prune, finetune, quantize, inspect, evaluate, import."""

__all__ = [
    "finetune",
    "finetune_options",
    "import_weights",
    "inspect",
    "model_source",
    "prune",
    "prune_options",
    "prune_report",
    "quantize",
    "quantize_options",
    "registry",
    "work",
]
