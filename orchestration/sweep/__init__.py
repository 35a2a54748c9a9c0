"""A sweep, phase by phase: dense, structured, allocation, gradual runs, quantization."""

__all__ = [
    "allocation",
    "artifacts",
    "context",
    "dense",
    "gradual",
    "quantize",
    "report",
    "run",
    "structured",
    "tasks",
    "training",
    "trial_runs",
]
