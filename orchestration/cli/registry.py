"""The commands around MLflow: ``models``, ``promote``, ``lineage``, ``evaluate`` and ``ui``."""

from __future__ import annotations

from typing import Any

import click

from orchestration.cli import options
from orchestration.common import defaults
from pruners.errors import InputError

_tracking = click.option(
    "--tracking-uri",
    "--tracking",
    help="MLflow. Default: that of --storage.",
    envvar="MLFLOW_TRACKING_URI",
)
_storage = options.storage_to_look_at


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


@click.command()
@click.argument("model")
@click.option("--data", "data_uri", required=True, help="Parquet file, folder or glob (image, label).")
@options.columns
@click.option("--tracking-uri", help="MLflow, for models:/NAME@alias.", envvar="MLFLOW_TRACKING_URI")
@_storage
@click.option("--batch-size", default=defaults.BATCH_SIZE, show_default=True, type=click.IntRange(min=1))
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

    columns = options.named(named)
    for line in evaluate_model(model, data_uri, tracking_uri, storage, batch_size, columns=columns):
        click.echo(line)


@click.command()
@click.option("--tracking-uri", help="MLflow server.", envvar="MLFLOW_TRACKING_URI")
@_storage
def models(tracking_uri: str | None, storage: str) -> None:
    """List the registered models."""
    from orchestration.commands.registry import list_models

    for line in list_models(tracking_uri, storage):
        click.echo(line)


@click.command()
@_storage
@click.option("--port", default=5000, show_default=True, type=click.IntRange(1024, 65535))
def ui(storage: str, port: int) -> None:
    """Open the MLflow UI over the sweeps of this machine, on loopback, until Ctrl-C."""
    from orchestration.commands.registry import serve_ui

    with InputError.renamed({"port": "--port"}):
        serve_ui(storage, port)


COMMANDS = (models, promote, lineage, evaluate, ui)
