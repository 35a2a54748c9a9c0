"""What a worker is told: the typed settings of models, data, training, pruning, quantization and latency."""

__all__ = [
    "base",
    "latency",
    "presets",
    "quantization",
    "schedules",
    "structured",
    "training",
]
