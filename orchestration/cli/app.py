"""The command line. Heavy imports wait inside the commands, so that help and mistakes answer at once."""

from __future__ import annotations

import os
import signal
import sys
from typing import Any

import click

from orchestration.cli import options as cli_options
from orchestration.cli import sweeps as cli_cluster
from orchestration.cli.benchmark import benchmark
from orchestration.cli.data import data
from orchestration.cli.export import export, pull
from orchestration.cli.finetune import finetune
from orchestration.cli.import_weights import import_
from orchestration.cli.prune import inspect_model, prune
from orchestration.cli.quantize import quantize
from orchestration.cli.registry import lineage, promote
from orchestration.cli.sweeps import compare
from orchestration.common.environment import INTERRUPTED
from orchestration.launch import launch
from orchestration.recipe.phases import PHASES, Phase, Span
from pruners.errors import InputError, did_you_mean
from pruners.redaction import without_secrets
from trainers import remote_calls as looks


class _Commands(click.Group):
    """Unknown commands are met with the nearest known one."""

    def resolve_command(self, ctx: click.Context, args: list[str]) -> Any:
        if args and self.get_command(ctx, args[0]) is None:
            names = self.list_commands(ctx)
            raise InputError(
                "command", args[0], f"must be one of {', '.join(names)}{did_you_mean(args[0], names)}"
            )
        return super().resolve_command(ctx, args)


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="espalier")
def cli() -> None:
    """Espalier: distributed pruning of vision transformers (DIMAP and oViT) on Ray."""


cli.add_command(prune)
cli.add_command(inspect_model)
cli.add_command(quantize)
cli.add_command(data)
cli.add_command(export)
cli.add_command(pull)
cli.add_command(benchmark)
cli.add_command(finetune)
cli.add_command(import_)
cli.add_command(promote)
cli.add_command(lineage)
cli.add_command(compare)
for command in cli_cluster.COMMANDS:
    cli.add_command(command)

_recipe = click.argument("recipe")
_overrides = cli_options.overrides
_dry_run = click.option("--dry-run", is_flag=True, help="Show what would happen; start nothing.")
_storage = cli_options.storage_to_look_at
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


@cli.command()
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

    overrides += tuple(cli_cluster.new_name(new))
    span = Span(first, last)
    said = ["sweep", recipe, *overrides, *span.words]
    chosen = load_recipe(recipe, overrides)
    launch(chosen, said, recipe, span=span, dry_run=dry_run, address=address, detach=detach)


@cli.command()
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
    from orchestration.recipe.loading import load_recipe, single

    overrides += tuple(cli_cluster.new_name(new))
    chosen = load_recipe(recipe, overrides)
    methods = chosen.pruning.methods
    if method is not None and method not in methods:
        raise InputError(
            "--method", method, f"must be one of {', '.join(methods)}{did_you_mean(method, methods)}"
        )
    one = single(chosen, method or methods[0])
    said = ["run", recipe, *overrides, "--method", one.pruning.methods[0]]
    launch(one, said, recipe, dry_run=dry_run, address=address, detach=detach)


@cli.command()
@_recipe
@_overrides
@click.option("--png", metavar="FILE", help="Write the schedule's picture there too.")
def plan(recipe: str, overrides: tuple[str, ...], png: str | None) -> None:
    """Show what a gradual run of RECIPE would be; needs neither data nor weights, and starts nothing."""
    from pathlib import Path

    from orchestration.common.terminal import Console
    from orchestration.preflight.checks import prepare
    from orchestration.preflight.plan import print_plan
    from orchestration.recipe.loading import load_recipe

    prepared = prepare(load_recipe(recipe, overrides), dry_run=True)
    console = Console()
    print_plan(console if console.is_terminal else Console(width=120), prepared, picture=True)
    if png is not None:
        from orchestration.preflight.plan import png as write

        try:
            click.echo(f"picture:    {write(prepared.recipe, Path(png))}")
        except (OSError, ValueError) as error:
            raise InputError("--png", png, f"cannot be written ({error})") from None


@cli.command()
@click.argument("model")
@click.option("--data", "data_uri", required=True, help="Parquet file, folder or glob (image, label).")
@cli_options.columns
@click.option("--tracking-uri", help="MLflow, for models:/NAME@alias.", envvar="MLFLOW_TRACKING_URI")
@_storage
@click.option("--batch-size", default=128, show_default=True, type=click.IntRange(min=1))
def evaluate(
    model: str,
    data_uri: str,
    tracking_uri: str | None,
    storage: str,
    batch_size: int,
    **named: str | None,
) -> None:
    """Top-1 and loss of MODEL (a checkpoint folder or models:/NAME@alias) on images."""
    from orchestration.commands.evaluate import evaluate_model

    columns = cli_options.named(named)
    for line in evaluate_model(model, data_uri, tracking_uri, storage, batch_size, columns=columns):
        click.echo(line)


@cli.command()
@click.option("--tracking-uri", help="MLflow server.", envvar="MLFLOW_TRACKING_URI")
@_storage
def models(tracking_uri: str | None, storage: str) -> None:
    """List the registered models."""
    from orchestration.commands.registry import list_models

    for line in list_models(tracking_uri, storage):
        click.echo(line)


@cli.command()
@_storage
@click.option("--port", default=5000, show_default=True, type=click.IntRange(1024, 65535))
def ui(storage: str, port: int) -> None:
    """Open the MLflow UI over the sweeps of this machine, on loopback, until Ctrl-C."""
    from orchestration.commands.registry import serve_ui

    serve_ui(storage, port)


@cli.command()
def recipes() -> None:
    """List the recipes that come with espalier."""
    from orchestration.recipe.loading import describe_shipped

    for name, text in describe_shipped():
        click.echo(f"{name:<30}{text}")


@cli.command()
@click.argument("part", default="")
def keys(part: str) -> None:
    """List the keys of a recipe: values, default, meaning; all, or those below PART (recovery.lr)."""
    from orchestration.common.terminal import Console
    from orchestration.recipe.reference import as_table, recipe_keys

    console = Console()
    (console if console.is_terminal else Console(width=180)).print(as_table(recipe_keys(part)))


def _end_in_order() -> None:
    """Ctrl-C and SIGTERM become one KeyboardInterrupt, also where a shell started us with them ignored."""

    def interrupt(number: int, frame: Any) -> None:
        # once is enough: a second one would break off the clean end
        for kind in (signal.SIGINT, signal.SIGTERM):
            signal.signal(kind, signal.SIG_IGN)
        raise KeyboardInterrupt

    for kind in (signal.SIGINT, signal.SIGTERM):
        signal.signal(kind, interrupt)


def main() -> None:
    """Entry point: an input error is one line and status 2."""
    _end_in_order()
    with looks.limited(looks.SECONDS):
        status = _status()
    if looks.abandoned():  # its client is waited for at an ordinary end, for minutes
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


def _status() -> int:
    try:
        status = cli(standalone_mode=False)
        return status if isinstance(status, int) else 0
    except InputError as error:
        click.echo(f"espalier: {error}", err=True)
        return 2
    except click.ClickException as error:
        click.echo(f"espalier: {without_secrets(' '.join(error.format_message().split()))}", err=True)
        return 2
    except FloatingPointError as error:
        click.echo(f"espalier: {error}", err=True)
        return 1
    except (KeyboardInterrupt, click.Abort):
        click.echo("interrupted", err=True)
        return INTERRUPTED
