"""``espalier finetune``: a sparse checkpoint on other images, its zeros held, without Ray."""

from __future__ import annotations

from typing import Any

import click

from orchestration.cli import options
from orchestration.cli.export import of_registry
from orchestration.common import defaults
from orchestration.common.environment import INTERRUPTED


@click.command()
@click.argument("checkpoint")
@click.argument("settings", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("--train", required=True, metavar="PARQUET", help="Training images.")
@click.option("--validation", metavar="PARQUET", help="Default: a tenth of the training images is held out.")
@click.option(
    "--classes",
    type=click.IntRange(min=2),
    help="Of the images. Another number than the checkpoint's brings a new classifier.",
)
@click.option("--out", required=True, metavar="FOLDER", help="Where the result goes.")
@click.option(
    "--layers", multiple=True, metavar="MODULE=REGEX", help="Default: by the model's family; repeatable."
)
@click.option("--seed", default=defaults.SEED, show_default=True, type=click.IntRange(min=0))
@click.option("--device", help="cpu or cuda. Default: cuda where there is one.")
@options.columns
@of_registry
def finetune(**typed: Any) -> None:
    """Train CHECKPOINT on other images; what is zero in it stays zero.

    CHECKPOINT is a checkpoint folder (any pyarrow URI), hf-hub:NAME, models:/NAME@alias, or the name of a
    timm model. KEY=VALUE are those of a recipe's recovery (epochs=10 lr.peak=1e-4, unless you say otherwise).
    The result is the best model on validation. After Ctrl-C the same command goes on.
    """
    from orchestration.commands.training_options import FinetuneOptions
    from orchestration.common.terminal import Console

    options = FinetuneOptions(**typed)
    options.check()
    try:
        with Console(stderr=True).status(f"espalier finetune: loading {options.checkpoint}"):
            from orchestration.commands.finetune import Finetuning

            work = Finetuning.of(options)
        lines = work.run()
    except KeyboardInterrupt:
        from orchestration.commands.progress import leave

        leave(INTERRUPTED)
    for line in lines:
        click.echo(line)


COMMANDS = (finetune,)
