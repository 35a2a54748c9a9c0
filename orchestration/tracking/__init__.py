"""MLflow: server, runs, registry, lineage, served models."""

__all__ = [
    "check",
    "datasets",
    "lineage",
    "paging",
    "promotion",
    "pyfunc_model",
    "registry",
    "served_model",
    "server",
    "server_keeper",
    "tracker",
]
