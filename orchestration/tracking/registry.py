"""The MLflow model registry: a version for the best of each method, with where it comes from in its tags."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from orchestration.tracking.paging import all_pages
from orchestration.tracking.tracker import Tracker
from orchestration.tracking.versions import Version, opened, parse, refusal
from pruners.errors import InputError
from trainers.config.structured import words

ARTIFACT = "checkpoint"
_LINEAGE = {
    "dense": "parent",  # the hash of the dense model's configuration and weights
    "data": "data",
    "git_commit": "git_commit",
    "recipe": "recipe_digest",
    "parent": "parent_version",
    "sweep": "sweep",
}


def register(
    tracker: Tracker, model: str, run: str, tags: Mapping[str, str], artifact: str = ARTIFACT
) -> str:
    """Make a checkpoint artifact of a run a version of ``model``, once; returns the version.

    A version of before gets the tags that it lacks.
    """
    from mlflow.exceptions import MlflowException

    client = tracker.client
    try:
        client.get_registered_model(model)
    except MlflowException:
        with suppress(
            MlflowException
        ):  # another sweep may be quicker; what else is wrong, the next line meets
            client.create_registered_model(model, description="Pruned by espalier; timm checkpoint folders")
        client.get_registered_model(model)
    if artifact != ARTIFACT:
        tags = {**tags, "artifact": artifact}
    for version in all_pages(client.search_model_versions, f"name='{model}'"):
        if version.run_id == run and str(version.source).endswith(f"/{artifact}"):
            for key in tags.keys() - dict(version.tags).keys():
                client.set_model_version_tag(model, version.version, key, tags[key])
            return str(version.version)
    source = f"{client.get_run(run).info.artifact_uri}/{artifact}"
    made = client.create_model_version(model, source, run, tags=dict(tags), await_creation_for=0)
    return str(made.version)


def versions(uri: str) -> list[Version]:
    """All registered versions, by model, newest first."""
    with opened(uri) as registry:
        return [version for name in sorted(registry.names()) for version in registry.versions(name)]


def version_of(reference: str, uri: str) -> str:
    """``models:/NAME/2`` for what an alias names now."""
    with opened(uri) as registry:
        return registry.resolve(reference).uri


@contextmanager
def pulled(reference: str, uri: str) -> Iterator[Path]:
    """The checkpoint folder of ``models:/NAME@alias`` or ``models:/NAME/2``, for as long as it is needed.

    Raises:
        InputError: no such model, version or alias.
    """
    import mlflow
    from mlflow.exceptions import MlflowException

    name, alias, version = parse(reference)
    client = mlflow.MlflowClient(uri)
    with TemporaryDirectory(prefix="espalier-") as target:
        try:
            found = (
                client.get_model_version_by_alias(name, alias)
                if alias
                else client.get_model_version(name, version)
            )
            # by the client, as mlflow.artifacts goes by a URI that is global to the process
            artifact = dict(found.tags).get("artifact", ARTIFACT)
            folder = Path(client.download_artifacts(str(found.run_id), artifact, target))
        except (MlflowException, OSError) as error:
            reason = f"cannot be had from the registry ({refusal(error, uri)})"
            raise InputError("model", reference, reason) from None
        yield folder


def describe(record: Mapping[str, Any]) -> dict[str, str]:
    """Tags of a version, from the record of its checkpoint: what it is, and what it comes from."""
    figures = record.get("figures", {})
    tags = {
        "method": str(record.get("method")),
        "sparsity": f"{record.get('sparsity', 0.0):.4f}",
        "validation_top1": f"{figures.get('val_top1', float('nan')):.6f}",
    }
    if "val_loss" in figures:
        tags["validation_loss"] = f"{figures['val_loss']:.6f}"
    cut = (record.get("structured") or {}).get("cut")
    if cut:
        tags["structured"] = words(cut)
    return tags | {tag: str(record[key]) for tag, key in _LINEAGE.items() if record.get(key)}
