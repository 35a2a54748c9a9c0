"""``espalier export`` and ``espalier pull``: convert a checkpoint, or copy one out of the registry."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, TypeVar

import click

from orchestration.cli import options
from pruners.errors import InputError
from trainers.deploy import formats

F = TypeVar("F", bound=Callable[..., Any])

COMPRESSED = "compressed"
FORMATS = {COMPRESSED: "a checkpoint folder without its zeros"} | {
    name: form.text for name, form in formats.FORMATS.items()
}
"""The formats that ``export`` can write, each with its purpose."""

_OPTIONS = {"format": "--format", "calibration": "--calibration"}


def of_registry(command: F) -> F:
    """The options of a command that also takes ``models:/NAME@alias``."""
    where = options.storage("Storage of the sweeps whose registry is meant, without a server.")
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
@click.option(
    "--data",
    metavar="PARQUET",
    help="Images on which the file's answers are compared with the model's before it is kept. "
    "Default: parts of two photographs.",
)
@click.option(
    "--calibration",
    metavar="PARQUET",
    help="Training images that fix the ranges of activations: for openvino-int8, and for onnx-int8 "
    "(static quantisation; without them they are measured as the model runs).",
)
@options.columns
@of_registry
def export(
    checkpoint: str,
    out: str,
    *,
    kind: str,
    data: str | None,
    calibration: str | None,
    tracking_uri: str | None,
    storage: str,
    **named: str | None,
) -> None:
    """Write CHECKPOINT in another form to the folder OUT.

    CHECKPOINT is a checkpoint folder (any pyarrow URI), hf-hub:NAME or models:/NAME@alias. A file for an
    engine is run by it, and kept only if it answers what the model answers; status 1 if it does not.
    """
    from orchestration.commands.prune_options import one_of
    from orchestration.common.terminal import Console

    one_of("--format", kind, FORMATS)
    console = Console(stderr=True)
    if kind != COMPRESSED:
        with InputError.renamed(_OPTIONS), console.status(f"espalier export: {checkpoint}"):
            formats.FORMATS[kind].check(kind, calibration)
            from orchestration.export.engine import ExportOptions, export
            from trainers.deploy.checked import CheckError

            asked = ExportOptions(checkpoint, out, kind, data, calibration, tracking_uri, storage, **named)
            try:
                export(asked, click.echo)
            except CheckError as error:
                click.echo(f"espalier: {error}", err=True)
                sys.exit(1)
        return
    for key, value in (("--data", data), ("--calibration", calibration)):
        if value is not None:
            raise InputError(key, value, f"{COMPRESSED} is not run by an engine; drop it")
    with console.status(f"espalier export: {checkpoint}"):
        from orchestration.export.compress import compress

        lines = compress(checkpoint, out, tracking_uri, storage)
    for line in lines:
        click.echo(line)


@click.command()
@click.argument("model")
@click.argument("dest")
@of_registry
def pull(model: str, dest: str, tracking_uri: str | None, storage: str) -> None:
    """Copy a registered MODEL (models:/NAME@alias or models:/NAME/VERSION) to the folder DEST."""
    from orchestration.common.terminal import Console

    with Console(stderr=True).status(f"espalier pull: {model}"):
        from orchestration.export.compress import pull as copy

        lines = copy(model, dest, tracking_uri, storage)
    for line in lines:
        click.echo(line)


COMMANDS = (export, pull)
