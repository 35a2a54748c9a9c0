"""The command line. Commands make heavy imports inside, so that help and errors are printed at once."""

from __future__ import annotations

import os
import signal
import sys
from typing import Any

import click

from orchestration.cli import (
    benchmark,
    data,
    export,
    finetune,
    import_weights,
    prune,
    quantize,
    registry,
    sweep,
    sweeps,
)
from orchestration.common.environment import INTERRUPTED
from pruners.errors import InputError, did_you_mean
from pruners.redaction import strip_secrets
from trainers import remote_calls


class _Commands(click.Group):
    """A group of commands whose error for an unknown command suggests the nearest known one."""

    def resolve_command(self, ctx: click.Context, args: list[str]) -> Any:
        if args and self.get_command(ctx, args[0]) is None:
            names = self.list_commands(ctx)
            raise InputError(
                "command", args[0], f"must be one of {', '.join(names)}{did_you_mean(args[0], names)}"
            )
        return super().resolve_command(ctx, args)


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="espalier")
def cli() -> None:
    """Espalier: distributed pruning of vision transformers (DIMAP and oViT) on Ray."""


for command in (
    *sweep.COMMANDS,
    *sweeps.COMMANDS,
    *registry.COMMANDS,
    *data.COMMANDS,
    *prune.COMMANDS,
    *finetune.COMMANDS,
    *quantize.COMMANDS,
    *export.COMMANDS,
    *benchmark.COMMANDS,
    *import_weights.COMMANDS,
):
    cli.add_command(command)


def _end_in_order() -> None:
    """Turn Ctrl-C and SIGTERM into one KeyboardInterrupt, even if a shell started us with them ignored."""

    def interrupt(number: int, frame: Any) -> None:
        # a second signal would interrupt the clean-up
        for kind in (signal.SIGINT, signal.SIGTERM):
            signal.signal(kind, signal.SIG_IGN)
        raise KeyboardInterrupt

    for kind in (signal.SIGINT, signal.SIGTERM):
        signal.signal(kind, interrupt)


def main() -> None:
    """Entry point. An input error is printed as one line, with exit status 2."""
    _end_in_order()
    with remote_calls.time_limit(remote_calls.LIMIT_SECONDS):
        status = _status()
    if remote_calls.any_abandoned():  # an ordinary end would wait for its client, for minutes
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


def _status() -> int:
    try:
        status = cli(standalone_mode=False)
        return status if isinstance(status, int) else 0
    except InputError as error:
        click.echo(f"espalier: {error}", err=True)
        return 2
    except click.ClickException as error:
        click.echo(f"espalier: {strip_secrets(' '.join(error.format_message().split()))}", err=True)
        return 2
    except FloatingPointError as error:
        click.echo(f"espalier: {error}", err=True)
        return 1
    except (KeyboardInterrupt, click.Abort):
        click.echo("interrupted", err=True)
        return INTERRUPTED
