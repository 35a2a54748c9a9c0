"""``espalier compare``: sweeps side by side, on the terminal or as a page for others."""

from __future__ import annotations

import click

from orchestration.cli import options as cli_options


@click.command()
@click.argument("names", metavar="NAME...", nargs=-1, required=True)
@cli_options.storage_to_look_at
@click.option("--html", metavar="FILE", help="Write it as one page with figures, which needs nothing else.")
def compare(names: tuple[str, ...], storage: str, html: str | None) -> None:
    """Final models of the sweeps NAME..., what differs between their recipes, and what failed."""
    from orchestration.common.terminal import Console
    from orchestration.reporting.compare import read, tables

    if html is None:
        console = Console()
        (console if console.is_terminal else Console(width=160)).print(tables(read(storage, names)))
        return
    from orchestration.commands.work import free_file
    from orchestration.reporting.compare_page import write

    target = free_file(html, "--html")
    write(read(storage, names), target)
    click.echo(f"page: {target}")
