"""``espalier data``: images into Parquet, and a look at what is there. Work waits in :mod:`trainers`."""

from __future__ import annotations

import os
from pathlib import Path

import click

_processes = click.option(
    "--processes",
    default=os.cpu_count() or 1,
    show_default="all processors",
    type=click.IntRange(min=1),
)


@click.group()
def data() -> None:
    """Images: convert folders and tars to Parquet, check what is there."""


@data.command()
@click.argument("imagefolder")
@click.argument("out")
@_processes
def convert(imagefolder: str, out: str, processes: int) -> None:
    """Turn IMAGEFOLDER (a folder for each class, or WebDataset tars) into Parquet shards in OUT.

    Labels follow the sorted names of the class folders, as torchvision's (classes.json). Started again, it
    goes on with the shards that are missing.
    """
    from rich.progress import Progress

    from orchestration.terminal import Console
    from trainers.convert import convert as write
    from trainers.convert import plan

    conversion = plan(Path(imagefolder))
    images = 0
    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("shards", total=len(conversion.shards))
        for _, count in write(conversion, Path(out), processes):
            images += count
            progress.advance(task)
    known = f" of {len(conversion.classes)} classes" if conversion.classes else ""
    click.echo(f"{images:,} images{known} in {len(conversion.shards)} files in {out}")


@data.command()
@click.argument("path")
@_processes
def check(path: str, processes: int) -> None:
    """Decode every image of PATH (a Parquet file or folder), count labels, list bad rows; exit 1 if any."""
    from rich.progress import Progress

    from orchestration.terminal import Console
    from trainers.survey import Survey, survey

    whole = Survey()
    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("row groups", total=None)
        for done, parts, found in survey(path, processes):
            progress.update(task, completed=done, total=parts)
            whole = found
    for line in whole.bad[:20]:
        click.echo(line)
    if len(whole.bad) > 20:
        click.echo(f"… and {len(whole.bad) - 20:,} more")
    counts = sorted(whole.labels.values())
    click.echo(f"images:  {whole.images:,}")
    if counts:
        spread = (
            f"{counts[0]:,} to {counts[-1]:,} images each" if len(counts) > 1 else f"{counts[0]:,} images"
        )
        click.echo(f"labels:  {len(counts):,} ({min(whole.labels)} to {max(whole.labels)}), {spread}")
    if whole.smallest and whole.largest:
        small, large = ("×".join(map(str, size)) for size in (whole.smallest, whole.largest))
        click.echo(f"sizes:   {small} to {large}")
    click.echo(f"bad:     {len(whole.bad):,}")
    if whole.bad:
        raise click.exceptions.Exit(1)
