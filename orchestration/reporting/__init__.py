"""Reports for people: progress, status, plots, comparison of sweeps."""

__all__ = [
    "compare",
    "compare_page",
    "display",
    "plots",
    "search_plots",
    "status",
]
