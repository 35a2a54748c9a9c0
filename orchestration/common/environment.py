"""Names and numbers that the command, its jobs and its processes agree on: exit status, variables, files."""

from __future__ import annotations

INTERRUPTED = 130


JOB = "ESPALIER_JOB"  # set in a job that we submitted


JOB_RECIPE = "recipe.json"


def is_jobs_api(address: str) -> bool:
    """Whether an address is that of Ray's Jobs API: what runs there is submitted as a job."""
    return address.startswith(("http://", "https://"))
