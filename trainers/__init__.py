"""Training, pruning, export and timing of one model, by one worker or several; only ray_worker uses Ray."""

__all__ = [
    "cache_folder",
    "checkpoint",
    "config",
    "data",
    "deploy",
    "distributed",
    "engines",
    "export",
    "host_memory",
    "loop",
    "models",
    "optional_imports",
    "process_pool",
    "quantization",
    "ray_worker",
    "remote_calls",
    "sources",
    "sparse",
    "storage",
    "structured",
]
