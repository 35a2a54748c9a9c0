"""Many of those on a cluster: recipes, searches, sweeps, tracking, and the command line."""

__all__ = [
    "benchmark",
    "cli",
    "client_driver",
    "cluster",
    "commands",
    "common",
    "export",
    "launch",
    "preflight",
    "recipe",
    "reporting",
    "search",
    "state",
    "sweep",
    "tracking",
]
