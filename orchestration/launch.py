"""A recipe as the command line runs it: shown, or started here, on a cluster's head, or from a laptop."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Sequence
from typing import Any

import click

INTERRUPTED = 130


def launch(
    recipe: Any, said: Sequence[str], name: str, *, dry_run: bool = False, address: str | None
) -> None:
    """Run a recipe to its end, or show what would happen.

    Args:
        said: the command as it was given, without the address: what goes on with it after Ctrl-C.
        name: of the recipe, as it was given.

    Raises:
        InputError: whatever keeps it from being run.
    """
    from rich.console import Console

    if dry_run:
        from orchestration.checks import prepare
        from orchestration.plan import print_plan

        console = Console()
        print_plan(console if console.is_terminal else Console(width=120), prepare(recipe, dry_run=True))
        return
    try:
        _start(said[0], recipe, name, address)
    except KeyboardInterrupt:
        where = ["--address", address] if address else []
        again = shlex.join(["espalier", *said, *where])
        click.echo(f"\ninterrupted; finished trials are kept. To go on: {again}", err=True)
        sys.stderr.flush()
        os._exit(INTERRUPTED)  # Ray's and MLflow's threads have nothing left to do


def _start(command: str, recipe: Any, name: str, address: str | None) -> None:
    from rich.console import Console

    if address is not None and address != "auto":
        from orchestration.ports import check_reachable

        check_reachable(address)
    if address is not None and address.startswith("ray://"):
        from orchestration.client import run_through_client

        run_through_client(recipe.model_dump(mode="json"), address=address, recipe_name=name)
        return
    from orchestration.stored_recipe import check_unchanged

    check_unchanged(recipe)
    # a mistake is one line alone: what goes on is said on a terminal, and gone when it is found
    with Console(stderr=True).status(f"espalier {command} {name}: checking the recipe"):
        from orchestration.checks import prepare
        from orchestration.display import Display
        from orchestration.sweep import run_sweep

        prepared = prepare(recipe, local=address is None)
    with Display() as display:
        display.say(f"espalier {command} {name}: starting Ray and MLflow")
        out = Console() if Console().is_terminal else Console(width=160)
        run_sweep(prepared, display, out, address=address, recipe_name=name)
