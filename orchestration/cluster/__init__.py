"""Ray clusters: joining one, its capacity, checks of its nodes, jobs."""

__all__ = [
    "check",
    "connect",
    "jobs_api",
    "keeper",
    "node_probe",
]
