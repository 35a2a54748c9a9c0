"""State of sweeps on the storage: locks, trial logs, elimination orders, latency tables, heartbeat."""

__all__ = [
    "heartbeat",
    "latency_store",
    "lock",
    "order_store",
    "stored_recipe",
    "trial_end",
    "trial_log",
]
