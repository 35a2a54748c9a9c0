"""``espalier evaluate``: the accuracy of a model on a table of images."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from pruners.errors import InputError
from trainers.storage import absolute

if TYPE_CHECKING:
    from trainers.sources.columns import Columns
from orchestration.commands.registry import registry_uri


def evaluate_model(
    model: str,
    data_uri: str,
    tracking_uri: str | None,
    storage: str,
    batch_size: int,
    *,
    columns: Columns | None = None,
) -> Iterator[str]:
    """Measure a model on some images.

    Args:
        model: checkpoint folder, ``hf-hub:NAME``, timm model or ``models:/NAME@alias``.
        data_uri: Parquet file, folder or glob.
        tracking_uri: MLflow's; ``None``: that of the storage.
        storage: of the sweeps whose registry is meant.
        batch_size: images at once.
        columns: of the table, where its metadata does not say which are meant.

    Returns:
        Lines with its figures.
    """
    from orchestration.commands.model_source import check_named

    check_named(model)
    if not model.startswith("models:/"):
        location = absolute(model) if "hf-hub:" not in model else model
        yield from _evaluate(location, data_uri, batch_size, columns)
        return
    from orchestration.tracking import registry

    with registry_uri(tracking_uri, storage) as uri, registry.pulled(model, uri) as folder:
        yield from _evaluate(str(folder), data_uri, batch_size, columns)


def _evaluate(
    checkpoint: str, data_uri: str, batch_size: int, columns: Columns | None = None
) -> Iterator[str]:
    from trainers.data import datasets
    from trainers.deploy.runnable import load_runnable
    from trainers.loop.evaluation import evaluate
    from trainers.sources.classes import check_known, names_of
    from trainers.sources.parquet import check_table

    loaded = load_runnable(checkpoint, key="model")
    channels = loaded.config["input_size"][0]
    if loaded.classes < 2 or channels != 3:
        what = f"is for {loaded.classes} classes and {channels} channels"
        raise InputError("model", checkpoint, f"{what}; must be for RGB images of two classes at least")
    check_table(data_uri, loaded.classes, key="--data", columns=columns)
    names = names_of(data_uri, key="--data", columns=columns, every=True)
    check_known(loaded.labels, names, key="--data", uri=data_uri)
    images = datasets.images(data_uri, datasets.eval_transform(loaded.config), key="--data", columns=columns)
    result = evaluate(loaded.model, datasets.eval_loader(images, batch_size))
    kind = loaded.kind.replace("int8", "INT8")
    by = "" if loaded.engine is None else f", {kind} by {loaded.engine}"
    yield f"images    {result.images}"
    yield f"top-1     {100 * result.top1:.2f} %{by}"
    yield f"loss      {result.loss:.4f}"
    yield f"sparsity  {100 * loaded.sparsity:.2f} % of the prunable weights"
