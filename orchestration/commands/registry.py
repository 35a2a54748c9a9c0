"""The registry and the UI: list versions, move aliases, show ancestries, serve MLflow."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import click

from orchestration.tracking.check import check_uri
from orchestration.tracking.server import start_server, tracking_folder
from orchestration.tracking.tracker import server_for
from pruners.errors import InputError

if TYPE_CHECKING:
    from orchestration.tracking.promotion import Decision

DATABASE = "mlflow.db"
_SHARED = "the server of another command at work; Ctrl-C ends it with the last that uses it"


@contextmanager
def registry_uri(tracking_uri: str | None, storage: str) -> Iterator[str]:
    """A tracking URI, in a ``with`` block: the given one, or that of an own server over a storage's database.

    Raises:
        InputError: no server answers there, or nothing has been logged in the storage.
    """
    if tracking_uri is not None:
        check_uri(tracking_uri)
        yield tracking_uri
        return
    folder = _folder(storage)
    with server_for(None, folder) as (uri, ready):
        ready()
        yield uri


def _database(tracking_uri: str | None, storage: str) -> str:
    """A tracking URI for reading without artifacts: our own database is opened directly, without a server."""
    if tracking_uri is not None:
        check_uri(tracking_uri)
    return tracking_uri or f"sqlite:///{_folder(storage) / DATABASE}"


def _folder(storage: str) -> Path:
    folder = tracking_folder(storage)
    if not (folder / DATABASE).is_file():
        raise InputError("--storage", storage, "no sweep has been logged there yet")
    return folder


def list_models(tracking_uri: str | None, storage: str) -> Iterator[str]:
    """A line for each registered version."""
    from orchestration.tracking import registry

    versions = registry.versions(_database(tracking_uri, storage))
    if not versions:
        yield "no registered models yet"
    for version in versions:
        tags = version.tags
        aliases = f"  @{', @'.join(version.aliases)}" if version.aliases else ""
        yield (
            f"{version.uri:<32}{tags.get('method', ''):<12}sparsity {tags.get('sparsity', '?'):<8}"
            f"validation top-1 {f'{version.top1:.4f}' if version.top1 >= 0 else '?'}{aliases}"
        )


def promote_version(
    name: str | None, number: str | None, alias: str, *, force: bool, tracking_uri: str | None, storage: str
) -> Decision:
    """Move an alias by the promotion rule of the model's last sweep, or by force.

    Args:
        name: of the registered model; default: the only one.
        number: of the version; default: the best that the rule allows.
        alias: the alias to move.
        force: move it even if the rule does not allow it.
        tracking_uri: MLflow's; ``None``: that of the storage.
        storage: of the sweeps whose registry is meant.

    Returns:
        The decision, with its reason.

    Raises:
        InputError: no such model or version, or names that MLflow does not take.
    """
    from orchestration.tracking import promotion
    from orchestration.tracking.check import check_alias, check_name
    from orchestration.tracking.registry import open_registry

    check_alias(alias, "--alias")
    if name is not None:
        check_name(name, "NAME")
    if number is not None and not number.isdecimal():
        raise InputError("--version", number, "must be the number of a version")
    with open_registry(_database(tracking_uri, storage)) as registry:
        names = registry.names()
        if name is None and len(names) != 1:
            raise InputError("NAME", None, f"must be one of {', '.join(names)}" if names else "no models yet")
        model = name or names[0]
        by_number = {version.version: version for version in registry.versions(model)}
        rule = registry.rule(model)
        if number is not None and number not in by_number:
            raise InputError(
                "--version", number, f"{model} has {', '.join(sorted(by_number, key=int)) or 'none'}"
            )
        candidate = (
            by_number[number] if number is not None else promotion.choose(registry, model, alias, rule)
        )
        return promotion.promote(registry, candidate, alias, rule, force=force)


def print_lineage(reference: str, tracking_uri: str | None, storage: str) -> Iterator[str]:
    """Describe a registered version and what it comes from.

    Args:
        reference: ``models:/NAME@alias`` or ``models:/NAME/VERSION``.
        tracking_uri: MLflow's; ``None``: that of the storage.
        storage: of the sweeps whose registry is meant.

    Returns:
        The lines.
    """
    from orchestration.tracking import lineage
    from orchestration.tracking.registry import open_registry, parse

    parse(reference)
    with open_registry(_database(tracking_uri, storage)) as registry:
        yield from lineage.lines(registry, reference)


def serve_ui(storage: str, port: int) -> None:
    """Serve the UI until interrupted."""
    server = start_server(_folder(storage), port)
    try:
        server.wait_ready()
        click.echo(f"MLflow UI at {server.uri} ({_SHARED if server.shared else 'Ctrl-C ends it'})")
        while server.lives():
            time.sleep(0.5)
    finally:
        server.stop()
