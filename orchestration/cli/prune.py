"""The commands that look at one model, without Ray: ``espalier prune`` and ``espalier inspect``."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import click

from orchestration.cli import options
from orchestration.common import defaults
from pruners.methods.registry import METHODS, SECOND_ORDER

if TYPE_CHECKING:
    from rich.status import Status


@click.command()
@click.argument("model")
@click.option("--out", required=True, metavar="FOLDER", help="Where the pruned checkpoint goes.")
@click.option(
    "--method",
    default=defaults.METHOD,
    show_default=True,
    help=f"{', '.join(name for name in METHODS if name not in SECOND_ORDER)} (from the weights alone); "
    f"{', '.join(name for name in METHODS if name in SECOND_ORDER)} (need --data).",
)
@click.option("--sparsity", type=float, help="Share of the prunable weights; N:M patterns bring their own.")
@click.option(
    "--data",
    metavar="PARQUET",
    help="Training images: for gradients, and for --reconstruct.",
)
@click.option("--test", metavar="PARQUET", help="Images on which top-1 is measured before and after.")
@click.option("--pattern", default=defaults.PATTERN, show_default=True, help="Or N:M as 2:4, or 1x4.")
@click.option(
    "--unfit", default=defaults.UNFIT, show_default=True, help="Or dense: leave what the pattern cannot fit."
)
@click.option(
    "--scope", help="What shares one threshold: layer, module, stage, global. Default: the method's."
)
@click.option(
    "--floor", type=float, default=defaults.FLOOR, show_default=True, help="Least sparsity of a layer."
)
@click.option(
    "--ceiling", type=float, default=defaults.CEILING, show_default=True, help="Largest sparsity of a layer."
)
@options.layers
@click.option("--gradients", type=click.IntRange(min=1), help="How many. Default: the method's (4096; 256).")
@click.option("--batch-size", default=defaults.BATCH_SIZE, show_default=True, type=click.IntRange(min=1))
@click.option("--per-sample", is_flag=True, help="A gradient of each image instead of each batch.")
@click.option("--block-size", type=click.IntRange(min=1), help="Weights of a Fisher block. Default: 192.")
@click.option("--damp", help="λ of the Fisher, or auto: the best of 1e-4 … 1e-9 on held-out images.")
@click.option("--relative/--absolute", default=None, help="λ is a share of the mean of a layer's diagonal.")
@click.option(
    "--rounds", metavar="N", help="In how many, or to which sparsities (0.75,0.9,0.95); shares the gradients."
)
@click.option(
    "--reconstruct",
    type=click.IntRange(min=1),
    metavar="IMAGES",
    help="Of --data, on which kept weights are solved again so that layers answer as before (1024 will do).",
)
@click.option("--memory", help="For the Fisher, as 8GiB. Default: 60 % of what is free.")
@options.seed
@click.option("--device", help="cpu or cuda. Default: cuda where there is one.")
@options.columns
def prune(**typed: Any) -> None:
    """Prune MODEL in one shot, without Ray.

    MODEL is a checkpoint folder, hf-hub:NAME, or the name of a timm model (its pretrained weights).
    """
    from orchestration.commands.prune_options import PruneOptions

    asked = PruneOptions(**typed)
    asked.check()

    def work(status: Status) -> list[str]:
        from orchestration.commands.prune import PruneJob

        job = PruneJob.of(asked)
        status.stop()
        return job.run()

    options.print_result(f"espalier prune: loading {asked.model}", work)


@click.command("inspect")
@click.argument("path")
@options.layers
@click.option("--json", "as_json", is_flag=True, help="The same as JSON.")
def inspect_model(path: str, layers: tuple[str, ...], as_json: bool) -> None:
    """Layers, zeros and costs of a model.

    PATH is a checkpoint folder, hf-hub:NAME, or the name of a timm architecture (shapes alone).
    """
    from orchestration.common.terminal import Console, output_console

    with Console(stderr=True).status(f"espalier inspect: loading {path}"):
        from orchestration.commands.inspect import describe
        from orchestration.commands.prune_options import layer_patterns

        description = describe(path, layer_patterns(layers))
    if as_json:
        click.echo(json.dumps(description.as_json(), indent=1))
        return
    output_console(120).print(description.table())
    for key, value in description.lines():
        click.echo(f"{key:<12}{value}")


COMMANDS = (prune, inspect_model)
