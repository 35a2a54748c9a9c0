"""``espalier data``: convert images to Parquet, and check them. The work is done in :mod:`trainers`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from orchestration.cli import options
from pruners.errors import InputError

if TYPE_CHECKING:
    from trainers.sources.classes import Names
    from trainers.sources.columns import Columns

_OPTIONS = {
    "source": "IMAGEFOLDER",
    "target": "OUT",
    "labels": "--labels",
    "ids": "--ids",
    "order": "--order",
}
"""Parameters of :mod:`trainers.sources` -> the option or argument of ``espalier data convert``."""
_PHRASES = {
    "by ids": "by --ids",
    "by first ": "by --first-label ",
    "by classes": "by --classes",
    "unlabelled: skip": "--unlabelled skip",
}

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
@click.option(
    "--classes",
    metavar="FILE",
    help="The class map of another part (train/classes.json), or a name a line. Default: the sorted names.",
)
@click.option(
    "--order",
    type=click.Choice(["torchvision", "timm"]),
    help="Of class folders that the two sort otherwise (10 before 2, or after). Default: torchvision.",
)
@click.option(
    "--labels",
    metavar="FILE",
    help="Images lie in one folder, and their labels in FILE: one a line in the order of names, or an image "
    "and its label a line, as text or CSV (ILSVRC's validation, Kaggle's LOC_val_solution.csv).",
)
@click.option(
    "--ids",
    metavar="FILE",
    help="What numbers in --labels, or folders 1…N, stand for: ILSVRC's meta.mat, or 'number name' a line.",
)
@click.option("--first-label", "first", type=click.IntRange(0, 1), help="What labels begin with. Default: 0.")
@click.option(
    "--unlabelled",
    type=click.Choice(["stop", "skip"]),
    default="stop",
    show_default=True,
    help="Samples without an image or a label.",
)
@_processes
def convert(
    imagefolder: str, out: str, *, processes: int, classes: str | None, **options_of_reading: Any
) -> None:
    """Turn IMAGEFOLDER (a folder for each class, or WebDataset tars) into Parquet shards in OUT.

    IMAGEFOLDER may be a quoted glob of tars. Labels follow the sorted names of the class folders, as
    torchvision's (classes.json). Started again, it goes on with the shards that are missing.
    """
    from rich.progress import Progress

    from orchestration.common.terminal import Console
    from trainers.sources.classes import read_map
    from trainers.sources.convert import convert as write
    from trainers.sources.convert import plan
    from trainers.sources.folders import SourceOptions

    names = () if classes is None else read_map(Path(classes), "--classes")
    files = {
        key: None if options_of_reading[key] is None else Path(options_of_reading.pop(key))
        for key in ("labels", "ids")
    }
    images = skipped = 0
    with InputError.renamed(_OPTIONS, _PHRASES):
        conversion = plan(Path(imagefolder), SourceOptions(classes=names, **options_of_reading | files))
        for line in conversion.notes:
            click.echo(line.replace("(order: timm; order: ", "(--order timm; --order "), err=True)
        with Progress(console=Console(stderr=True), transient=True) as progress:
            task = progress.add_task("shards", total=len(conversion.shards))
            for shard in write(conversion, Path(out), processes):
                images += shard.images
                skipped += shard.skipped
                progress.advance(task)
    known = f" of {len(conversion.classes)} classes" if conversion.classes else ""
    click.echo(f"{images:,} images{known} in {len(conversion.shards)} files in {out}")
    if skipped:
        click.echo(f"{skipped:,} samples without an image or a label are left out", err=True)


@data.command()
@click.argument("paths", metavar="PATH...", nargs=-1, required=True)
@options.columns
@_processes
def check(paths: tuple[str, ...], processes: int, **named: str | None) -> None:
    """Decode every image of PATH (a Parquet file, a folder or a glob), count labels, list bad rows.

    Several PATHs (train, validation, test) must also call their classes alike. Exit 1 if a row is bad.
    """
    from trainers.sources.classes import check_alike, names_of

    wanted = options.named(named)
    names = {path: names_of(path, key="PATH", columns=wanted, every=True) for path in paths}
    check_alike(names, key="PATH")
    bad = 0
    for path in paths:
        if len(paths) > 1:
            click.echo(path)
        bad += _check(path, processes, wanted, names[path])
    if bad:
        raise click.exceptions.Exit(1)


def _check(path: str, processes: int, wanted: Columns, names: Names) -> int:
    """Print the content of one table; return the number of its bad rows."""
    from rich.progress import Progress

    from orchestration.common.terminal import Console
    from trainers.sources.audit import DatasetAudit, audit_dataset

    whole = DatasetAudit()
    with (
        InputError.renamed({"uri": "PATH"}),
        Progress(console=Console(stderr=True), transient=True) as progress,
    ):
        task = progress.add_task("row groups", total=None)
        for done, parts, survey_so_far in audit_dataset(path, processes, wanted):
            progress.update(task, completed=done, total=parts)
            whole = survey_so_far
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
    if names:
        click.echo(f"classes: {len(names):,} ({', '.join(names[:3])}{', …' * (len(names) > 3)})")
    if whole.smallest and whole.largest:
        small, large = ("×".join(map(str, size)) for size in (whole.smallest, whole.largest))
        click.echo(f"sizes:   {small} to {large}")
    click.echo(f"bad:     {len(whole.bad):,}")
    return len(whole.bad)


COMMANDS = (data,)
