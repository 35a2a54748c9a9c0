"""The commands that ask the model registry: ``espalier promote`` and ``espalier lineage``."""

from __future__ import annotations

from typing import Any

import click

from orchestration.cli import options as cli_options

_tracking = click.option(
    "--tracking-uri",
    "--tracking",
    help="MLflow. Default: that of --storage.",
    envvar="MLFLOW_TRACKING_URI",
)
_storage = cli_options.storage_to_look_at


@click.command()
@click.argument("name", required=False)
@click.option("--version", "number", metavar="V", help="Default: the best that the rule lets.")
@click.option("--alias", default="champion", show_default=True, help="Or sparsity-75, or one of your own.")
@click.option("--force", is_flag=True, help="Whatever the rule says.")
@_storage
@_tracking
def promote(name: str | None, **typed: Any) -> None:
    """Give a version of the registered model NAME an alias by rule; exit 1 if the rule is against it.

    A champion is as sparse as the model's last sweep asked for (tracking.promotion), was measured on the same
    data as the champion before, and is not below it on validation.
    """
    from orchestration.commands.registry import promote_version

    decision = promote_version(name, **typed)
    click.echo(decision)
    if decision.refused:
        raise click.exceptions.Exit(1)


@click.command()
@click.argument("model", metavar="models:/NAME@ALIAS")
@_storage
@_tracking
def lineage(model: str, storage: str, tracking_uri: str | None) -> None:
    """What a registered version comes from: dense model, recipe, data, commit, and the version before it."""
    from orchestration.commands.registry import print_lineage

    for line in print_lineage(model, tracking_uri, storage):
        click.echo(line)
