"""The commands around a recipe: sweep, run, plan, recipes, keys."""

from __future__ import annotations

import click

from orchestration.cli import options, sweeps
from orchestration.launch import launch
from orchestration.recipe.phases import PHASES, Phase, PhaseRange
from pruners.errors import InputError, did_you_mean

_recipe = click.argument("recipe")


_overrides = options.overrides


_dry_run = click.option("--dry-run", is_flag=True, help="Show what would happen; start nothing.")


_as = click.option("--as", "new", metavar="NEW", help="Run it as a sweep of its own, of this name.")


_address = click.option(
    "--address",
    help="Ray cluster to run on: auto, ray://HOST:10001, or http://HOST:8265 to submit a job. "
    "Default: this machine.",
)


_from = click.option(
    "--from",
    "first",
    type=click.Choice(PHASES),
    default=PHASES[0],
    help="Start with this phase; those before it must be known.",
)


_until = click.option(
    "--until", "last", type=click.Choice(PHASES), default=PHASES[-1], help="End after this phase."
)


_detach = click.option("--detach", is_flag=True, help="Submit the job and leave it at work.")


_OPTIONS = {"first": "--from", "last": "--until"}
_PHRASES = {"first = ": "--from ", "last = ": "--until "}


@click.command()
@_recipe
@_overrides
@_from
@_until
@_as
@_dry_run
@_address
@_detach
def sweep(
    recipe: str,
    overrides: tuple[str, ...],
    *,
    first: Phase,
    last: Phase,
    new: str | None,
    dry_run: bool,
    address: str | None,
    detach: bool,
) -> None:
    """Search allocations and schedules of all methods of RECIPE, and register the best models."""
    from orchestration.recipe.loading import load_recipe

    overrides += tuple(sweeps.new_name(new))
    chosen = load_recipe(recipe, overrides)
    with InputError.renamed(_OPTIONS, _PHRASES):
        phases = PhaseRange(first, last)
        command = ["sweep", recipe, *overrides, *phases.options]
        launch(chosen, command, recipe, phase_range=phases, dry_run=dry_run, address=address, detach=detach)


@click.command()
@_recipe
@_overrides
@click.option("--method", help="Default: the recipe's first.")
@_as
@_dry_run
@_address
@_detach
def run(
    recipe: str,
    overrides: tuple[str, ...],
    *,
    method: str | None,
    new: str | None,
    dry_run: bool,
    address: str | None,
    detach: bool,
) -> None:
    """One model, one method, no search: the gradual run of RECIPE as it stands."""
    from orchestration.recipe.loading import load_recipe, single_run

    overrides += tuple(sweeps.new_name(new))
    chosen = load_recipe(recipe, overrides)
    methods = chosen.pruning.methods
    if method is not None and method not in methods:
        raise InputError(
            "--method", method, f"must be one of {', '.join(methods)}{did_you_mean(method, methods)}"
        )
    single = single_run(chosen, method or methods[0])
    command = ["run", recipe, *overrides, "--method", single.pruning.methods[0]]
    launch(single, command, recipe, dry_run=dry_run, address=address, detach=detach)


@click.command()
@_recipe
@_overrides
@click.option("--png", metavar="FILE", help="Write the schedule's picture there too.")
def plan(recipe: str, overrides: tuple[str, ...], png: str | None) -> None:
    """Show what a gradual run of RECIPE would be; needs neither data nor weights, and starts nothing."""
    from pathlib import Path

    from orchestration.common.terminal import output_console
    from orchestration.preflight.checks import prepare
    from orchestration.preflight.plan import print_plan
    from orchestration.recipe.loading import load_recipe

    prepared = prepare(load_recipe(recipe, overrides), dry_run=True)
    print_plan(output_console(120), prepared, picture=True)
    if png is not None:
        from orchestration.preflight.plan import png as write

        try:
            click.echo(f"picture:    {write(prepared.recipe, Path(png))}")
        except (OSError, ValueError) as error:
            raise InputError("--png", png, f"cannot be written ({error})") from None


@click.command()
def recipes() -> None:
    """List the recipes that come with espalier."""
    from orchestration.recipe.loading import describe_shipped

    for name, text in describe_shipped():
        click.echo(f"{name:<30}{text}")


@click.command()
@click.argument("part", default="")
def keys(part: str) -> None:
    """List the keys of a recipe: values, default, meaning; all, or those below PART (recovery.lr)."""
    from orchestration.common.terminal import output_console
    from orchestration.recipe.reference import as_table, recipe_keys

    output_console(180).print(as_table(recipe_keys(part)))


COMMANDS = (sweep, run, plan, recipes, keys)
