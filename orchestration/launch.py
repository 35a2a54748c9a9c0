"""Start a recipe from the command line: show its plan, run it here or on a cluster's head, or as a job."""

from __future__ import annotations

import os
import shlex
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from orchestration.common.environment import INTERRUPTED, JOB, JOB_RECIPE, is_jobs_api
from orchestration.recipe.phases import ALL_PHASES, PhaseRange
from pruners.errors import InputError, first_line
from pruners.redaction import strip_secrets

if TYPE_CHECKING:
    from orchestration.recipe.schema import Recipe

ERROR = "error.txt"  # trace of a sweep that broke off


def launch(
    recipe: Recipe,
    command: Sequence[str],
    name: str,
    *,
    phase_range: PhaseRange = ALL_PHASES,
    dry_run: bool = False,
    address: str | None,
    detach: bool = False,
) -> None:
    """Run a recipe to its end, or show what would happen.

    Args:
        recipe: the recipe, read and typed.
        command: the command as it was given, without the address; after Ctrl-C it resumes the run.
        name: of the recipe, as it was given.
        phase_range: the phases to run.
        dry_run: show the plan, start nothing.
        address: of the cluster; ``None``: this machine.
        detach: do not follow a submitted job.

    Raises:
        InputError: it cannot be run; says why.
    """
    if dry_run:
        _show(recipe)
        return
    if address is not None and is_jobs_api(address):
        words = ["sweep", JOB_RECIPE, *phase_range.options]
        run = {"sweep": recipe.name, "storage": recipe.storage}
        raise click.exceptions.Exit(run_as_job(words, address, recipe=recipe, detach=detach, **run))
    if detach:
        raise InputError("--detach", None, "needs --address http://HOST:8265, where the job goes on")
    again = strip_secrets(shlex.join(["espalier", *command, *(["--address", address] if address else [])]))
    if JOB in os.environ:  # the user is at the laptop that submitted the job
        again = f"espalier resume {recipe.name} --address http://HOST:8265"
    try:
        _start(command[0], recipe, name, address, phase_range)
    except InputError:
        raise
    except Exception as error:  # one line here, and the whole trace in a file
        click.echo(f"espalier: {recipe.name} broke off: {first_line(error)}", err=True)
        click.echo(f"finished trials are kept; to go on: {again}; {_trace(recipe)}", err=True)
        raise click.exceptions.Exit(1) from None
    except KeyboardInterrupt:
        click.echo(f"\ninterrupted; finished trials are kept. To go on: {again}", err=True)
        sys.stderr.flush()
        os._exit(INTERRUPTED)  # without waiting for Ray's and MLflow's threads


def _trace(recipe: Recipe) -> str:
    """Write the trace of the error that is being handled beside the sweep's results; return its path."""
    from orchestration.state.stored_recipe import folder_of
    from trainers import storage

    file = f"{folder_of(recipe.storage, recipe.name)}/{ERROR}"
    trace = strip_secrets(traceback.format_exc())
    try:
        storage.write_bytes(file, trace.encode())
    except OSError:  # the storage itself may be the cause
        return f"the trace:\n{trace}"
    return f"the trace is in {strip_secrets(file)}"


def run_as_job(
    words: Sequence[str],
    address: str,
    *,
    recipe: Recipe | None = None,
    sweep: str | None = None,
    storage: str | None = None,
    detach: bool = False,
) -> int:
    """Run ``espalier WORDS`` on a cluster, through its Jobs API.

    Args:
        words: the command line after ``espalier``.
        address: ``http://HOST:8265``.
        recipe: goes with it as :data:`JOB_RECIPE`.
        sweep: the name of the sweep that it runs, if it runs one.
        storage: where the sweep lies.
        detach: do not follow it.

    Returns:
        The exit status.

    Raises:
        InputError: the cluster takes no job of ours.
    """
    from orchestration.cluster.jobs_api import follow, open_jobs, submit

    client = open_jobs(address)
    job = submit(client, words, sweep=sweep, storage=storage, recipe=recipe)
    if sweep is None:
        return follow(client, job)
    if detach:
        click.echo(f"submitted as job {job}; {farewell(sweep, address)}")
        return 0
    click.echo(f"submitted as job {job}; Ctrl-C leaves it at work", err=True)
    return follow(client, job, farewell(sweep, address))


def farewell(sweep: str, address: str) -> str:
    """A line about a submitted sweep: the commands that follow it and end it."""
    arguments = f"{sweep} --address {address}"
    return (
        f"the sweep goes on; to follow it: espalier attach {arguments}; to end it: espalier stop {arguments}"
    )


def _show(recipe: Recipe) -> None:
    from orchestration.common.terminal import output_console
    from orchestration.preflight.checks import prepare
    from orchestration.preflight.plan import print_plan

    print_plan(output_console(120), prepare(recipe, dry_run=True))


def _start(command: str, recipe: Recipe, name: str, address: str | None, phase_range: PhaseRange) -> None:
    from orchestration.common.terminal import Console, output_console

    if JOB in os.environ and "://" not in recipe.storage and not Path(recipe.storage).is_absolute():
        expected = "for a job, must be a full path or URI that every node reaches (or ESPALIER_STORAGE there)"
        raise InputError("storage", recipe.storage, expected)
    if address is not None and address != "auto":
        from orchestration.common.network import check_reachable

        check_reachable(address)
    if address is not None and address.startswith("ray://"):
        from orchestration.client_driver import run_through_client

        run_through_client(recipe, address=address, recipe_name=name, phase_range=phase_range)
        return
    from orchestration.preflight.start import check_start
    from trainers import remote_calls

    check_start(recipe)
    # the status line is gone when a mistake is found: the error is one line alone
    with Console(stderr=True).status(f"espalier {command} {name}: checking the recipe"):
        from orchestration.preflight.checks import prepare
        from orchestration.reporting.display import Display
        from orchestration.sweep.run import run_sweep

        prepared = prepare(recipe, local=address is None)
    with Display() as display:
        display.say(f"espalier {command} {name}: starting Ray and MLflow")
        out = output_console(180)
        with remote_calls.time_limit(None):  # from here on a storage may be away for a while
            run_sweep(prepared, display, out, address=address, recipe_name=name, phase_range=phase_range)
