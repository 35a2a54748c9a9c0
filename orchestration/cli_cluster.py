"""``espalier status``, ``logs``, ``stop``, ``resume``: sweeps that are at work, or were."""

from __future__ import annotations

import time
from typing import Any

import click

from pruners.errors import InputError

_STOP_SECONDS = 120.0
_LOOK_SECONDS = 2.0

_name = click.argument("name")
_storage = click.option(
    "--storage", default="runs", show_default=True, envvar="ESPALIER_STORAGE", help="Storage of the sweeps."
)


def new_name(recipe: str | None) -> list[str]:
    """``--as NEW`` as an override of a recipe."""
    import json

    return [] if recipe is None else [f"name={json.dumps(recipe)}"]


@click.command()
@click.argument("name", required=False)
@_storage
@click.option("--once", is_flag=True, help="Print it and end, as it does where there is no terminal.")
def status(name: str | None, storage: str, once: bool) -> None:
    """Phases, trials, best, time left and failures of all sweeps, or of NAME; live until Ctrl-C."""
    from rich.console import Console

    from orchestration.status import overview

    console = Console()
    if once or not console.is_terminal:
        (console if console.is_terminal else Console(width=160)).print(overview(storage, name))
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
def logs(name: str, trial: str | None, storage: str) -> None:
    """The last lines of the sweep NAME; or the figures, error and places of a TRIAL (ovit-schedule-001)."""
    from orchestration.status import log_lines

    for line in log_lines(storage, name, trial):
        click.echo(line)


@click.command()
@_name
@_storage
def stop(name: str, storage: str) -> None:
    """End the sweep NAME as Ctrl-C would, wherever its driver runs: what is finished is kept."""
    from orchestration import journal
    from orchestration.stored_recipe import find

    find(storage, name)
    state = journal.read(storage, name)
    if state is None or state["state"] != "running":
        raise InputError("name", name, f"is not at work ({state['state'] if state else 'no journal'})")
    journal.ask_to_stop(storage, name)
    deadline = time.monotonic() + _STOP_SECONDS
    while (state := journal.read(storage, name)) and state["state"] == "running":
        if time.monotonic() > deadline:
            click.echo(f"asked, but not ended in {_STOP_SECONDS:.0f} s; see espalier status {name}", err=True)
            raise click.exceptions.Exit(1)
        time.sleep(0.5)
    click.echo(f"{name}: {state['state'] if state else 'ended'}; to go on: espalier resume {name}")


@click.command()
@_name
@click.argument("overrides", nargs=-1, metavar="[KEY.SUB=VALUE]...")
@_storage
@click.option("--as", "new", metavar="NEW", help="Run it as a sweep of its own, of this name.")
@click.option("--address", help="As of 'espalier sweep'.")
def resume(name: str, overrides: tuple[str, ...], storage: str, new: str | None, address: str | None) -> None:
    """Go on with the sweep NAME by the recipe stored with it; finished trials are not repeated."""
    from orchestration.launch import launch
    from orchestration.recipes import overridden
    from orchestration.stored_recipe import load

    content: dict[str, Any] = load(storage, name).model_dump(mode="json")
    recipe = overridden(content, [*overrides, *new_name(new)])
    where = [] if storage == "runs" else ["--storage", storage]
    said = ["resume", recipe.name, *([] if new is not None else overrides), *where]
    launch(recipe, said, name, address=address)


@click.group()
def cluster() -> None:
    """A Ray cluster that is there already."""


@cluster.command("check")
@click.argument("recipe", required=False)
@click.argument("overrides", nargs=-1, metavar="[KEY.SUB=VALUE]...")
@click.option("--address", default="auto", show_default=True, help="auto, HOST:PORT or ray://HOST:10001.")
@click.option("--storage", envvar="ESPALIER_STORAGE", help="For every node to try. Default: the recipe's.")
def cluster_check(recipe: str | None, overrides: tuple[str, ...], address: str, storage: str | None) -> None:
    """What the cluster offers, whether its nodes share the storage, reach MLflow and hold the same versions,
    and whether RECIPE fits. Exit 1 with a line for each problem."""
    from rich.console import Console

    from orchestration.recipes import load_recipe

    chosen = None if recipe is None else load_recipe(recipe, overrides)
    place = storage or (chosen.storage if chosen is not None else None)
    if address != "auto":
        from orchestration.ports import check_reachable

        check_reachable(address)
    from orchestration import cluster_check as checking

    if address.startswith("ray://"):
        content = None if chosen is None else chosen.model_dump(mode="json")
        nodes, problems = checking.check_through_client(address, content, place)
    else:
        nodes, problems = checking.check_cluster(address, chosen, place)
    console = Console()
    (console if console.is_terminal else Console(width=160)).print(checking.offers(nodes))
    for problem in problems:
        click.echo(problem)
    if problems:
        raise click.exceptions.Exit(1)
    tried = f", all reach {place}" if place else ""
    fits = f"; {chosen.name} fits" if chosen is not None else ""
    click.echo(f"{len(nodes)} nodes of the same versions{tried}{fits}")


COMMANDS: tuple[click.Command, ...] = (status, logs, stop, resume, cluster)
