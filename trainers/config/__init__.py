"""Typed settings of jobs: models, data, training, pruning, quantization and latency."""

__all__ = [
    "base",
    "data",
    "engines",
    "jobs",
    "latency",
    "presets",
    "pruning",
    "quantization",
    "schedules",
    "structured",
    "training",
]
