"""Commands as jobs on a cluster, by Ray's Jobs API: submitted with our source, followed, found again."""

from __future__ import annotations

import asyncio
import json
import logging
import re
import shlex
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import click
from ray.exceptions import AuthenticationError
from ray.job_submission import JobDetails, JobStatus, JobSubmissionClient

from orchestration.cluster.ray_internals import PACKAGING_LOGGER
from orchestration.common.environment import INTERRUPTED, JOB, JOB_RECIPE
from orchestration.common.network import check_reachable
from orchestration.recipe.schema import Recipe
from orchestration.state.stored_recipe import content_of
from pruners.errors import InputError, did_you_mean, first_line
from pruners.redaction import strip_credentials

_PACKAGES = ("pruners", "trainers", "orchestration", "experiments")
_TAG = "espalier"  # of a job's metadata: the sweep that it runs
_PLACE = "espalier.storage"  # and its storage
_END_SECONDS = 30.0
# lines of the job's supervisor, before ours
_SUPERVISOR = re.compile(r"\S+ \S+\s+INFO job_\w+\.py|Running entrypoint for job ")


def open_jobs(address: str) -> JobSubmissionClient:
    """The Jobs API behind ``http://HOST:8265``.

    Raises:
        InputError: nobody answers there, or not to our token.
    """
    check_reachable(address)
    for name in ("dashboard_sdk", "job.sdk"):  # both set their own levels
        logging.getLogger(f"ray.dashboard.modules.{name}").setLevel(logging.ERROR)
    logging.getLogger(PACKAGING_LOGGER).setLevel(logging.ERROR)
    try:
        return JobSubmissionClient(address)
    except (AuthenticationError, ConnectionError, RuntimeError, OSError, ValueError) as error:
        expected = f"the Jobs API does not answer us ({first_line(error)})"
        raise InputError("--address", address, expected) from None


def submit(
    client: JobSubmissionClient,
    words: Sequence[str],
    *,
    sweep: str | None = None,
    storage: str | None = None,
    recipe: Recipe | None = None,
) -> str:
    """Submit ``espalier WORDS`` as a job, with this machine's source of Espalier.

    Args:
        client: of the cluster's Jobs API.
        words: the command line after ``espalier``.
        sweep: the name of the sweep that it runs, by which it is found again.
        storage: the sweep's storage, so that later commands find the sweep by its name.
        recipe: packed as :data:`JOB_RECIPE`.

    Returns:
        The job's id.

    Raises:
        InputError: a job runs that sweep already.
    """
    job = None if sweep is None else _free_id(client, sweep)
    with _packed(recipe) as folder:
        try:
            taken = client.submit_job(
                entrypoint=f"exec python -m orchestration.cli {shlex.join(words)}",
                submission_id=job,
                runtime_env={"working_dir": str(folder), "env_vars": {JOB: "1"}},
                metadata=_metadata(sweep, storage),
            )
        except RuntimeError as error:
            raise InputError("--address", None, f"the job was not taken ({first_line(error)})") from None
    return str(taken)


def _metadata(sweep: str | None, storage: str | None) -> dict[str, str]:
    """Metadata of a job on Ray's dashboard: no password, and no path of this machine."""
    if sweep is None:
        return {}
    if storage is None or not _travels(storage) or strip_credentials(storage) != storage:
        return {_TAG: sweep}
    return {_TAG: sweep, _PLACE: storage}


def follow(client: JobSubmissionClient, job: str, farewell: str = "") -> int:
    """Print a job's output until it ends.

    Args:
        client: of the cluster's Jobs API.
        job: its id.
        farewell: printed when Ctrl-C ends the following, and not the job.

    Returns:
        The job's exit status; 130 after Ctrl-C.
    """
    try:
        asyncio.run(_print(client, job))
    except KeyboardInterrupt:
        click.echo(f"\n{farewell}", err=True)
        return INTERRUPTED
    deadline = time.monotonic() + _END_SECONDS
    while not (info := client.get_job_info(job)).status.is_terminal() and time.monotonic() < deadline:
        time.sleep(0.2)
    if info.driver_exit_code is not None:
        return int(info.driver_exit_code)
    if info.status == JobStatus.FAILED:
        click.echo(f"job {job}: {info.message}", err=True)
    return {JobStatus.SUCCEEDED: 0, JobStatus.STOPPED: INTERRUPTED}.get(info.status, 1)


def job_of(client: JobSubmissionClient, sweep: str) -> str:
    """The id of the newest job that ran a sweep.

    Raises:
        InputError: no job ran it.
    """
    jobs = _jobs(client)
    if sweep not in jobs:
        raise InputError("name", sweep, f"no job of this cluster ran it{did_you_mean(sweep, jobs)}")
    return str(jobs[sweep][-1].submission_id)


def storage_of(client: JobSubmissionClient, sweep: str | None) -> str | None:
    """Storage of the newest job of ``sweep`` (of any sweep if ``None``) that recorded one.

    Returns:
        The storage; ``None`` if no job recorded one.
    """
    by_sweep = _jobs(client)
    jobs = [job for name, jobs in by_sweep.items() if sweep in (None, name) for job in jobs]
    jobs.sort(key=lambda job: job.start_time or 0)
    return next((job.metadata[_PLACE] for job in reversed(jobs) if _PLACE in (job.metadata or {})), None)


async def _print(client: JobSubmissionClient, job: str) -> None:
    rest = ""
    async for text in client.tail_job_logs(job):
        *lines, rest = (rest + text).split("\n")
        for line in lines:
            if not _SUPERVISOR.match(line):
                sys.stdout.write(f"{line}\n")
        sys.stdout.flush()
    sys.stdout.write(rest)


def _jobs(client: JobSubmissionClient) -> dict[str, list[JobDetails]]:
    """The jobs of each sweep, the latest last."""
    by_sweep: dict[str, list[JobDetails]] = {}
    for job in sorted(client.list_jobs(), key=lambda job: job.start_time or 0):
        if sweep := (job.metadata or {}).get(_TAG):
            by_sweep.setdefault(sweep, []).append(job)
    return by_sweep


def _free_id(client: JobSubmissionClient, sweep: str) -> str:
    earlier = _jobs(client).get(sweep, [])
    at_work = [str(job.submission_id) for job in earlier if not job.status.is_terminal()]
    if at_work:
        advice = "follow it by 'espalier attach', or end it by 'espalier stop'"
        raise InputError("name", sweep, f"job {at_work[0]} is at work on it; {advice}")
    taken = {job.submission_id for job in earlier}
    number = next(n for n in range(1, len(taken) + 2) if f"espalier-{sweep}-{n}" not in taken)
    return f"espalier-{sweep}-{number}"


@contextmanager
def _packed(recipe: Recipe | None) -> Iterator[Path]:
    """A folder with our packages as they are here, and the recipe."""
    with tempfile.TemporaryDirectory(prefix="espalier-job-") as made:
        folder = Path(made)
        for name in _PACKAGES:
            spec = find_spec(name)
            assert spec is not None, "what runs can be found"
            source = next(iter(spec.submodule_search_locations or []))
            shutil.copytree(source, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        if recipe is not None:
            (folder / JOB_RECIPE).write_text(json.dumps(_for_elsewhere(recipe)), encoding="utf-8")
        yield folder


def _travels(storage: str) -> bool:
    """Return whether the address of a storage means the same on another machine."""
    return "://" in storage or Path(storage).is_absolute()


def _for_elsewhere(recipe: Recipe) -> Mapping[str, Any]:
    """A recipe without addresses that hold on this machine only; the cluster's environment has its own."""
    content = content_of(recipe)
    if _travels(recipe.storage):
        content["storage"] = recipe.storage
    if content["tracking"]["uri"] is None:
        del content["tracking"]["uri"]
    return content
