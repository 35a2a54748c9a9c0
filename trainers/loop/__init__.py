"""The training loop: gradual pruning and recovery, epoch by epoch and step by step."""

__all__ = [
    "builders",
    "elimination",
    "evaluation",
    "gradual",
    "losses",
    "metrics",
    "optimization",
    "prune_step",
    "report",
    "schedules",
    "session",
    "train_step",
]
