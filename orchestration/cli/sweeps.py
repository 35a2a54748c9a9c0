"""``espalier status``, ``logs``, ``stop`` …: commands about sweeps, here or on a cluster, and the cluster."""

from __future__ import annotations

import time

import click

from orchestration.cli import options
from orchestration.common import defaults
from orchestration.common.environment import JOB_RECIPE, is_jobs_api
from orchestration.launch import farewell, launch, run_as_job
from pruners.errors import InputError

_STOP_SECONDS = 120.0
_LOOK_SECONDS = 2.0

_name = click.argument("name")
_by_option = InputError.renamed({"storage": "--storage"})
_overrides = options.overrides
_storage = options.storage("Storage of the sweeps.")
_address = click.option(
    "--address", help="http://HOST:8265 of the cluster, where this machine does not see the storage."
)


@click.command()
@click.argument("name", required=False)
@_storage
@_address
@click.option("--once", is_flag=True, help="Print it and end, as it does where there is no terminal.")
@_by_option
def status(name: str | None, storage: str, address: str | None, once: bool) -> None:
    """Phases, trials, best, time left and failures of all sweeps, or of NAME; live until Ctrl-C."""
    _run_on_cluster(address, ["status", *([name] if name else [])], storage)
    from orchestration.common.terminal import Console, output_console
    from orchestration.reporting.status import overview

    console = Console()
    if once or not console.is_terminal:
        output_console(160).print(overview(storage, name))
        return
    from rich.live import Live

    with Live(overview(storage, name), console=console, auto_refresh=False) as live:
        try:
            while True:
                time.sleep(_LOOK_SECONDS)
                live.update(overview(storage, name), refresh=True)
        except KeyboardInterrupt:
            return


@click.command()
@_name
@click.argument("trial", required=False)
@_storage
@_address
@_by_option
def logs(name: str, trial: str | None, storage: str, address: str | None) -> None:
    """The last lines of the sweep NAME; or the figures, error and places of a TRIAL (ovit-schedule-001)."""
    _run_on_cluster(address, ["logs", name, *([trial] if trial else [])], storage)
    from orchestration.reporting.status import log_lines

    for line in log_lines(storage, name, trial):
        click.echo(line)


@click.command()
@_name
@_storage
@_address
@_by_option
def stop(name: str, storage: str, address: str | None) -> None:
    """End the sweep NAME as Ctrl-C would, wherever its driver runs: what is finished is kept."""
    _run_on_cluster(address, ["stop", name], storage)
    from orchestration.state import heartbeat
    from orchestration.state.stored_recipe import check_exists

    check_exists(storage, name)
    state = heartbeat.read(storage, name)
    if state is None or state["state"] != "running":
        raise InputError("name", name, f"is not at work ({state['state'] if state else 'no journal'})")
    heartbeat.ask_to_stop(storage, name)
    deadline = time.monotonic() + _STOP_SECONDS
    while (state := heartbeat.read(storage, name)) and state["state"] == "running":
        if time.monotonic() > deadline:
            click.echo(f"asked, but not ended in {_STOP_SECONDS:.0f} s; see espalier status {name}", err=True)
            raise click.exceptions.Exit(1)
        time.sleep(0.5)
    click.echo(f"{name}: {state['state'] if state else 'ended'}; to go on: espalier resume {name}")


@click.command()
@_name
@_overrides
@_storage
@click.option("--as", "new", metavar="NEW", help="Run it as a sweep of its own, of this name.")
@click.option("--address", help="As of 'espalier sweep'.")
@click.option("--detach", is_flag=True, help="Submit the job and leave it at work.")
def resume(
    name: str,
    overrides: tuple[str, ...],
    *,
    storage: str,
    new: str | None,
    address: str | None,
    detach: bool,
) -> None:
    """Go on with the sweep NAME by the recipe stored with it; finished trials are not repeated."""
    if address is not None and is_jobs_api(address):  # the recipe is on the cluster's storage
        storage = _put(storage, address, name)
        where = _where(storage)
        words = ["resume", name, *overrides, *(["--as", new] if new else []), *where]
        job = run_as_job(words, address, sweep=new or name, storage=storage, detach=detach)
        raise click.exceptions.Exit(job)
    where = _where(storage)
    from orchestration.state.stored_recipe import load

    def by_option(error: InputError) -> InputError:
        ours = error.key == "storage" and str(error.value).startswith(storage)  # else it is an override's
        return error.replaced(key="--storage") if ours else error

    with InputError.renamed(by_option):
        recipe = load(storage, name, [*overrides, *new_name(new)])
    command = ["resume", recipe.name, *([] if new else overrides), *where]
    launch(recipe, command, name, address=address, detach=detach)


@click.command()
@_name
@click.option("--address", required=True, help="http://HOST:8265 of the cluster.")
def attach(name: str, address: str) -> None:
    """Follow the sweep NAME that was submitted as a job; Ctrl-C leaves it at work."""
    from orchestration.cluster.jobs_api import follow, job_of, open_jobs

    client = open_jobs(address)
    raise click.exceptions.Exit(follow(client, job_of(client, name), farewell(name, address)))


@click.group()
def cluster() -> None:
    """A Ray cluster that is there already."""


@cluster.command("check")
@click.argument("recipe", required=False)
@_overrides
@click.option(
    "--address", default="auto", show_default=True, help="auto, ray://HOST:10001, http://HOST:8265."
)
@click.option("--storage", envvar="ESPALIER_STORAGE", help="For every node to try. Default: the recipe's.")
def cluster_check(recipe: str | None, overrides: tuple[str, ...], address: str, storage: str | None) -> None:
    """What the cluster offers, whether its nodes share the storage, reach MLflow and hold the same versions,
    and whether RECIPE fits. Exit 1 with a line for each problem."""
    from orchestration.common.network import check_reachable
    from orchestration.common.terminal import output_console
    from orchestration.recipe.loading import load_recipe

    chosen = None if recipe is None else load_recipe(recipe, overrides)
    if is_jobs_api(address):
        words = ["cluster", "check", *([JOB_RECIPE] if chosen else []), *_where(storage)]
        raise click.exceptions.Exit(run_as_job(words, address, recipe=chosen))
    if address != "auto":
        check_reachable(address)
    from orchestration.cluster import check

    storage_uri = storage or (chosen.storage if chosen is not None else None)
    if address.startswith("ray://"):
        content = None if chosen is None else chosen.model_dump(mode="json")
        nodes, problems = check.check_through_client(address, content, storage_uri)
    else:
        nodes, problems = check.check_cluster(address, chosen, storage_uri)
    output_console(160).print(check.offers(nodes))
    for problem in problems:
        click.echo(problem)
    if problems:
        raise click.exceptions.Exit(1)
    tried = f", all reach {storage_uri}" if storage_uri else ""
    fits = f"; {chosen.name} fits" if chosen is not None else ""
    click.echo(f"{len(nodes)} nodes of the same versions{tried}{fits}")


def new_name(name: str | None) -> list[str]:
    """Turn ``--as NEW`` into an override of a recipe."""
    import json

    return [] if name is None else [f"name={json.dumps(name)}"]


def _where(storage: str | None) -> list[str]:
    return [] if storage in (None, defaults.STORAGE) else ["--storage", str(storage)]


def _put(storage: str, address: str, name: str | None) -> str:
    """The given storage, or the storage of the sweep's newest job."""
    if storage != defaults.STORAGE:
        return storage
    from orchestration.cluster.jobs_api import open_jobs, storage_of

    return storage_of(open_jobs(address), name) or storage


def _run_on_cluster(address: str | None, words: list[str], storage: str) -> None:
    """Run the command on the cluster instead, if an address is given."""
    if address is None:
        return
    if not is_jobs_api(address):
        raise InputError("--address", address, "must be http://HOST:8265, the cluster's Jobs API")
    where = _where(_put(storage, address, words[1] if len(words) > 1 else None))
    raise click.exceptions.Exit(run_as_job([*words, *where], address))


@click.command()
@click.argument("names", metavar="NAME...", nargs=-1, required=True)
@options.storage_to_look_at
@click.option("--html", metavar="FILE", help="Write it as one page with figures, which needs nothing else.")
@_by_option
def compare(names: tuple[str, ...], storage: str, html: str | None) -> None:
    """Final models of the sweeps NAME..., what differs between their recipes, and what failed."""
    from orchestration.common.terminal import output_console
    from orchestration.reporting.compare import read, tables

    if html is None:
        output_console(160).print(tables(read(storage, names)))
        return
    from orchestration.commands.output import free_file
    from orchestration.reporting.compare_page import write

    target = free_file(html, "--html")
    sweeps = read(storage, names)
    with InputError.renamed({"target": "--html"}):
        write(sweeps, target)
    click.echo(f"page: {target}")


COMMANDS: tuple[click.Command, ...] = (status, logs, stop, resume, attach, cluster, compare)
