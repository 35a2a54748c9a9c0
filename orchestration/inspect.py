"""Looking at what is there: evaluate a model, list the registry, open the UI."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import click

from orchestration.tracking import check_uri, server_for, start_server, tracking_folder
from pruners.errors import InputError
from trainers.storage import absolute

DATABASE = "mlflow.db"


@contextmanager
def registry_uri(tracking_uri: str | None, storage: str) -> Iterator[str]:
    """A tracking URI for a while: the one given, or that of a server of ours over a storage's database.

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


def _folder(storage: str) -> Path:
    folder = tracking_folder(storage)
    if not (folder / DATABASE).is_file():
        raise InputError("--storage", storage, "no sweep has been logged there yet")
    return folder


def evaluate_model(
    model: str, data_uri: str, tracking_uri: str | None, storage: str, batch_size: int
) -> Iterator[str]:
    """Lines with a model's figures on some images."""
    if not model.startswith("models:/"):
        yield from _evaluate(absolute(model) if "hf-hub:" not in model else model, data_uri, batch_size)
        return
    from orchestration import registry

    with registry_uri(tracking_uri, storage) as uri, registry.pulled(model, uri) as folder:
        yield from _evaluate(str(folder), data_uri, batch_size)


def _evaluate(checkpoint: str, data_uri: str, batch_size: int) -> Iterator[str]:
    from trainers import data, models
    from trainers.checkpoint import load_checkpoint
    from trainers.evaluate import evaluate
    from trainers.tables import check_table

    loaded = load_checkpoint(checkpoint, key="model")
    check_table(data_uri, models.classes(loaded.model), key="--data")
    transform = data.eval_transform(models.data_config(loaded.model))
    images = data.images(data_uri, transform, key="--data")
    result = evaluate(loaded.model, data.eval_loader(images, batch_size))
    sparsity = loaded.masks.sparsity if loaded.masks is not None else 0.0
    yield f"images    {result.images}"
    yield f"top-1     {100 * result.top1:.2f} %"
    yield f"loss      {result.loss:.4f}"
    yield f"sparsity  {100 * sparsity:.2f} % of the prunable weights"


def list_models(tracking_uri: str | None, storage: str) -> Iterator[str]:
    """A line for each registered version."""
    from orchestration import registry

    if tracking_uri is not None:
        check_uri(tracking_uri)
    # our own database is read as it lies: no server is needed to list it
    found = registry.versions(tracking_uri or f"sqlite:///{_folder(storage) / DATABASE}")
    if not found:
        yield "no registered models yet"
    for version in found:
        tags = version.tags
        aliases = f"  @{', @'.join(version.aliases)}" if version.aliases else ""
        yield (
            f"{version.uri:<32}{tags.get('method', ''):<12}sparsity {tags.get('sparsity', '?'):<8}"
            f"validation top-1 {tags.get('validation_top1', '?')}{aliases}"
        )


def serve_ui(storage: str, port: int) -> None:
    """Serve the UI until interrupted."""
    server = start_server(_folder(storage), port)
    try:
        server.wait_ready()
        click.echo(f"MLflow UI at {server.uri} (Ctrl-C ends it)")
        server.process.wait()
    finally:
        server.stop()
