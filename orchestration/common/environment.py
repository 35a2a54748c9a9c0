"""Names and numbers that the command, its jobs and its processes share: exit status, variables, files."""

from __future__ import annotations

INTERRUPTED = 130


JOB = "ESPALIER_JOB"  # set in a job that we submitted


JOB_RECIPE = "recipe.json"


def is_jobs_api(address: str) -> bool:
    """Return whether an address is that of Ray's Jobs API, to which commands are submitted as jobs."""
    return address.startswith(("http://", "https://"))
