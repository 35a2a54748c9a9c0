"""``espalier export`` and ``espalier pull``: a checkpoint in another form, or out of the registry."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import click

from orchestration import cli_options

F = TypeVar("F", bound=Callable[..., Any])

FORMATS = {"compressed": "a checkpoint folder without its zeros"}
"""What ``export`` can write; :mod:`orchestration.export_command` writes it."""


def of_registry(command: F) -> F:
    """The options of a command that also takes ``models:/NAME@alias``."""
    where = cli_options.storage("Storage of the sweeps whose registry is meant, without a server.")
    server = click.option(
        "--tracking-uri",
        "--tracking",
        "tracking_uri",
        metavar="URI",
        envvar="MLFLOW_TRACKING_URI",
        help="MLflow server, for models:/NAME@alias.",
    )
    return server(where(command))


@click.command()
@click.argument("checkpoint")
@click.argument("out")
@click.option(
    "--format",
    "kind",
    required=True,
    metavar="FORMAT",
    help="; ".join(f"{name}: {text}" for name, text in FORMATS.items()) + ".",
)
@of_registry
def export(checkpoint: str, out: str, kind: str, tracking_uri: str | None, storage: str) -> None:
    """Write CHECKPOINT in another form to the folder OUT.

    CHECKPOINT is a checkpoint folder (any pyarrow URI), hf-hub:NAME or models:/NAME@alias.
    """
    from rich.console import Console

    from orchestration.prune_options import one_of

    one_of("--format", kind, FORMATS)
    with Console(stderr=True).status(f"espalier export: {checkpoint}"):
        from orchestration.export_command import compress

        lines = compress(checkpoint, out, tracking_uri, storage)
    for line in lines:
        click.echo(line)


@click.command()
@click.argument("model")
@click.argument("dest")
@of_registry
def pull(model: str, dest: str, tracking_uri: str | None, storage: str) -> None:
    """Copy a registered MODEL (models:/NAME@alias or models:/NAME/VERSION) to the folder DEST."""
    from rich.console import Console

    with Console(stderr=True).status(f"espalier pull: {model}"):
        from orchestration.export_command import pull as copy

        lines = copy(model, dest, tracking_uri, storage)
    for line in lines:
        click.echo(line)
