"""``espalier finetune``: a sparse checkpoint on other images, its zeros held, without Ray."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from orchestration.cli import options
from orchestration.cli.export import of_registry

if TYPE_CHECKING:
    from rich.status import Status


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
@options.layers
@options.seed
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

    asked = FinetuneOptions(**typed)
    asked.check()

    def work(status: Status) -> list[str]:
        from orchestration.commands.finetune import Finetuning

        finetuning = Finetuning.of(asked)
        status.stop()
        return finetuning.run()

    options.print_result(f"espalier finetune: loading {asked.checkpoint}", work)


COMMANDS = (finetune,)
