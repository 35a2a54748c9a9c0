"""``espalier quantize``: a checkpoint at hand to INT8, its zeros held, without Ray."""

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
@click.option(
    "--mode",
    required=True,
    help="dynamic (no images), static (ranges from --train), qat (trained with fake quantisation).",
)
@click.option("--train", metavar="PARQUET", help="Training images: for ranges, and for qat.")
@click.option("--validation", metavar="PARQUET", help="qat. Default: a tenth of --train is held out.")
@click.option("--test", metavar="PARQUET", help="Images on which top-1 is measured before and after.")
@click.option(
    "--images", type=click.IntRange(min=1), help="That ranges are taken from. Default: 512 at most."
)
@click.option("--out", required=True, metavar="FOLDER", help="Where the INT8 folder goes.")
@options.seed
@click.option("--device", help="qat: cpu or cuda. Default: cuda where there is one.")
@options.columns
@of_registry
def quantize(**typed: Any) -> None:
    """Write CHECKPOINT as an INT8 model for ONNX Runtime; what is zero in it is 0 there.

    CHECKPOINT is a checkpoint folder (any pyarrow URI), hf-hub:NAME or models:/NAME@alias. KEY=VALUE are
    those of a recipe's recovery, for qat (epochs=10 lr.kind=linear lr.peak=1e-4 lr.floor=1e-5, unless you
    say otherwise). After Ctrl-C the same command goes on with its training.
    """
    from orchestration.commands.training_options import QuantizeOptions

    asked = QuantizeOptions(**typed)
    asked.check()

    def work(status: Status) -> list[str]:
        from orchestration.commands.output import forget_training
        from orchestration.commands.quantize import quantize_checkpoint

        lines = quantize_checkpoint(asked, status)
        forget_training(asked.hidden)
        return lines

    try:
        options.print_result(f"espalier quantize: {asked.checkpoint}", work)
    except RuntimeError as error:
        click.echo(f"espalier: {asked.checkpoint} is not quantised: {error}", err=True)
        raise click.exceptions.Exit(1) from None


COMMANDS = (quantize,)
