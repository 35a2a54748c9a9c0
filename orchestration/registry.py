"""The MLflow model registry: a version for the best of each method, ``champion`` for the best of all."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from orchestration.tracking import Tracker
from pruners.errors import InputError

CHAMPION = "champion"
ARTIFACT = "checkpoint"


@dataclass(frozen=True)
class Version:
    """A registered version, as ``espalier models`` lists it."""

    model: str
    version: str
    aliases: tuple[str, ...]
    tags: Mapping[str, str]

    @property
    def uri(self) -> str:
        return f"models:/{self.model}/{self.version}"


def register(
    tracker: Tracker, model: str, run: str, tags: Mapping[str, str], artifact: str = ARTIFACT
) -> str:
    """Make a checkpoint artifact of a run a version of ``model``, once; returns the version."""
    from mlflow.exceptions import MlflowException

    client = tracker.client
    try:
        client.get_registered_model(model)
    except MlflowException:
        client.create_registered_model(model, description="Pruned by espalier; timm checkpoint folders")
    for version in client.search_model_versions(f"name='{model}'"):
        if version.run_id == run and str(version.source).endswith(f"/{artifact}"):
            return str(version.version)
    source = f"{client.get_run(run).info.artifact_uri}/{artifact}"
    if artifact != ARTIFACT:
        tags = {**tags, "artifact": artifact}
    made = client.create_model_version(model, source, run, tags=dict(tags), await_creation_for=0)
    return str(made.version)


def crown(tracker: Tracker, model: str, version: str, alias: str = CHAMPION) -> None:
    """Give a version the alias; whatever carried it before loses it."""
    tracker.client.set_registered_model_alias(model, alias, version)


def versions(uri: str) -> list[Version]:
    """All registered versions, newest first."""
    import mlflow

    client = mlflow.MlflowClient(uri)
    found = []
    for model in client.search_registered_models(max_results=1000):
        aliases: dict[str, list[str]] = {}
        for alias, version in dict(model.aliases).items():
            aliases.setdefault(str(version), []).append(alias)
        for entry in client.search_model_versions(f"name='{model.name}'"):
            names = tuple(sorted(aliases.get(str(entry.version), [])))
            found.append(Version(model.name, str(entry.version), names, dict(entry.tags)))
    return sorted(found, key=lambda version: (version.model, -int(version.version)))


@contextmanager
def pulled(reference: str, uri: str) -> Iterator[Path]:
    """The checkpoint folder of ``models:/NAME@alias`` or ``models:/NAME/2``, for as long as it is needed.

    Raises:
        InputError: no such model, version or alias.
    """
    import mlflow
    from mlflow.exceptions import MlflowException

    name, alias, version = _parse(reference)
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
            reason = (str(error).splitlines() or ["unknown"])[0]
            raise InputError("model", reference, f"cannot be had from the registry ({reason})") from None
        yield folder


def _parse(reference: str) -> tuple[str, str, str]:
    """(name, alias, version) of ``models:/NAME@alias`` or ``models:/NAME/VERSION``."""
    found = re.fullmatch(r"models:/([^/@]+)(?:@([^/@]+)|/(\d+))", reference)
    if found is None:
        raise InputError("model", reference, "must be models:/NAME@alias or models:/NAME/VERSION")
    return found[1], found[2] or "", found[3] or ""


def describe(record: Mapping[str, Any]) -> dict[str, str]:
    """Tags of a version, from the record of its checkpoint."""
    figures = record.get("figures", {})
    return {
        "method": str(record.get("method")),
        "sparsity": f"{record.get('sparsity', 0.0):.4f}",
        "validation_top1": f"{figures.get('val_top1', float('nan')):.4f}",
    }
