"""Ray clusters: joining one, its capacity, checks of its nodes, jobs."""

__all__ = [
    "capacity",
    "check",
    "connect",
    "jobs_api",
    "keeper",
    "node_probe",
    "ray_internals",
]
