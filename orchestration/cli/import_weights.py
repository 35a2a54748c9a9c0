"""``espalier import``: a file of weights into a checkpoint folder."""

from __future__ import annotations

import click


@click.command("import")
@click.argument("file")
@click.option("--out", required=True, metavar="FOLDER", help="Where the checkpoint folder goes.")
@click.option("--architecture", metavar="NAME", help="timm's model. Default: what the file says.")
@click.option("--arg", "arguments", multiple=True, metavar="KEY=VALUE", help="For timm's model; repeatable.")
@click.option(
    "--ema/--no-ema", default=True, help="The moving average, where the file holds one. Default: yes."
)
def import_(file: str, out: str, architecture: str | None, arguments: tuple[str, ...], *, ema: bool) -> None:
    """Make a checkpoint folder of FILE, which holds weights as training scripts leave them.

    FILE is a .pth or .pth.tar of timm's train.py, of the original Swin or DeiT, a .ckpt of Lightning, or any
    state_dict; names may begin with module., _orig_mod. or model. It is read without running code of it.
    """
    from orchestration.commands.import_weights import import_weights

    for line in import_weights(file, out, architecture, arguments, average=ema):
        click.echo(line)


COMMANDS = (import_,)
