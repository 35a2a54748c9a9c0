"""A sweep, phase by phase: dense, structured, allocation, gradual runs, INT8 and files for engines."""

__all__ = [
    "allocation",
    "artifacts",
    "context",
    "dense",
    "deploy",
    "gradual",
    "phases",
    "report",
    "run",
    "structured",
    "tasks",
    "training",
    "trial_runs",
]
