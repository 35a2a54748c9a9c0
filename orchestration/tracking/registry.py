"""Versions of registered models: list them, read their tags, figures and aliases, register new ones."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from orchestration.recipe.schema import Promotion
from orchestration.tracking.paging import all_pages
from orchestration.tracking.server import quiet_environment
from orchestration.tracking.tracker import Tracker
from pruners.errors import InputError, did_you_mean, first_line
from pruners.redaction import strip_credentials
from trainers.config.structured import format_cut

if TYPE_CHECKING:
    from mlflow import MlflowClient

CHAMPION = "champion"
_RULE = "promotion."  # tags of a registered model: the promotion rule of the last sweep that registered in it
_LEVELS = 20  # most levels of nested runs


@dataclass(frozen=True)
class Version:
    """A registered version, as ``espalier models`` lists it."""

    model: str
    version: str
    aliases: tuple[str, ...]
    tags: Mapping[str, str]
    run: str = ""

    @property
    def uri(self) -> str:
        return f"models:/{self.model}/{self.version}"

    @property
    def data(self) -> str:
        """Hash of the images that it was measured on; empty for versions that older espaliers registered."""
        return self.tags.get("data", "")

    @property
    def sparsity(self) -> float:
        return self._number("sparsity", 0.0)

    @property
    def top1(self) -> float:
        """Top-1 on validation, in 0…1; -1: unknown."""
        return self._number("validation_top1", -1.0)

    @property
    def rank(self) -> tuple[float, float]:
        """Sort key of quality on validation, the greater the better: top-1, then the loss."""
        return self.top1, -self._number("validation_loss", math.inf)

    def _number(self, tag: str, otherwise: float) -> float:
        try:
            number = float(self.tags.get(tag, otherwise))
        except ValueError:
            return otherwise
        return otherwise if math.isnan(number) else number


class Registry:
    """One registry of MLflow, as sweeps and commands use it."""

    def __init__(self, client: MlflowClient) -> None:
        self._client = client

    def names(self) -> list[str]:
        """Names of all registered models."""
        return [model.name for model in all_pages(self._client.search_registered_models)]

    def versions(self, model: str) -> list[Version]:
        """Versions of a model, newest first.

        Raises:
            InputError: no such model.
        """
        from mlflow.exceptions import MlflowException

        try:
            registered = self._client.get_registered_model(model)
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            expected = f"no such registered model{did_you_mean(model, self.names())}"
            raise InputError("model", model, expected) from None
        aliases: dict[str, list[str]] = {}
        for alias, version in dict(registered.aliases).items():
            aliases.setdefault(str(version), []).append(alias)
        listed = [
            Version(
                model,
                str(entry.version),
                tuple(sorted(aliases.get(str(entry.version), []))),
                dict(entry.tags),
                str(entry.run_id or ""),
            )
            for entry in all_pages(self._client.search_model_versions, f"name='{model}'")
        ]
        return sorted(listed, key=lambda version: -int(version.version))

    def resolve(self, reference: str) -> Version:
        """The version that ``models:/NAME@alias`` or ``models:/NAME/2`` names.

        Raises:
            InputError: no such model, version or alias.
        """
        name, alias, version = parse(reference)
        versions = self.versions(name)
        for known in versions:
            if known.version == version or alias in known.aliases:
                return known
        choices = [known.version for known in versions] + [
            f"@{name}" for known in versions for name in known.aliases
        ]
        raise InputError("model", reference, f"no such version; there is {', '.join(choices) or 'none'}")

    def holder(self, model: str, alias: str) -> Version | None:
        """The version that has an alias."""
        return next((version for version in self.versions(model) if alias in version.aliases), None)

    def set_alias(self, version: Version, alias: str) -> None:
        """Give a version an alias; the version that had it before loses it."""
        self._client.set_registered_model_alias(version.model, alias, version.version)

    def rule(self, model: str) -> Promotion:
        """The promotion rule of the last sweep."""
        tags = dict(self._client.get_registered_model(model).tags)
        content = {key.removeprefix(_RULE): tags[key] for key in tags if key.startswith(_RULE)}
        return Promotion.model_validate({key: value or None for key, value in content.items()})

    def set_rule(self, model: str, rule: Promotion) -> None:
        for key, value in rule.model_dump(mode="json").items():
            self._client.set_registered_model_tag(model, _RULE + key, "" if value is None else str(value))

    def runs_above(self, run: str) -> list[str]:
        """A version's run and the runs in which it is nested; the last is the sweep's run."""
        runs: list[str] = []
        while run and run not in runs and len(runs) < _LEVELS:
            runs.append(run)
            run = str(self._client.get_run(run).data.tags.get("mlflow.parentRunId", ""))
        return runs


@contextmanager
def open_registry(uri: str) -> Iterator[Registry]:
    """Open the registry of an MLflow server; its errors become one-line errors.

    Raises:
        InputError: MLflow refused something within the block.
    """
    import mlflow
    from mlflow.exceptions import MlflowException

    os.environ.update(quiet_environment())
    try:
        yield Registry(mlflow.MlflowClient(uri))
    except MlflowException as error:
        raise InputError("MLflow", strip_credentials(uri), f"refuses ({refusal(error, uri)})") from None


def refusal(error: Exception, uri: str) -> str:
    """MLflow's message in one line, without the password that its messages repeat."""
    return first_line(error).replace(uri.rstrip("/"), strip_credentials(uri).rstrip("/"))


def parse(reference: str) -> tuple[str, str, str]:
    """(name, alias, version) of ``models:/NAME@alias`` or ``models:/NAME/VERSION``.

    Raises:
        InputError: neither of the two.
    """
    match = re.fullmatch(r"models:/([^/@]+)(?:@([^/@]+)|/(\d+))", reference)
    if match is None:
        raise InputError("model", reference, "must be models:/NAME@alias or models:/NAME/VERSION")
    return match[1], match[2] or "", match[3] or ""


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
    """Register a checkpoint artifact of a run as a version of a model, once.

    If there is such a version already, it gets the tags that it lacks.

    Args:
        tracker: of the MLflow that holds the run.
        model: name of the registered model.
        run: the run's id.
        tags: of the version.
        artifact: the artifact's name.

    Returns:
        The version's number.
    """
    return tracker.patiently(_register, tracker.client, model, run, dict(tags), artifact)


def _register(client: MlflowClient, model: str, run: str, tags: dict[str, str], artifact: str) -> str:
    from mlflow.exceptions import MlflowException

    try:
        client.get_registered_model(model)
    except MlflowException:
        with suppress(MlflowException):  # another sweep may be quicker; other errors come up in the next line
            client.create_registered_model(model, description="Pruned by espalier; timm checkpoint folders")
        client.get_registered_model(model)
    if artifact != ARTIFACT:
        tags |= {"artifact": artifact}
    for version in all_pages(client.search_model_versions, f"name='{model}'"):
        if version.run_id == run and str(version.source).endswith(f"/{artifact}"):
            for key in tags.keys() - dict(version.tags).keys():
                client.set_model_version_tag(model, version.version, key, tags[key])
            return str(version.version)
    source = f"{client.get_run(run).info.artifact_uri}/{artifact}"
    made = client.create_model_version(model, source, run, tags=tags, await_creation_for=0)
    return str(made.version)


def versions(uri: str) -> list[Version]:
    """All registered versions, by model, newest first."""
    with open_registry(uri) as registry:
        return [version for name in sorted(registry.names()) for version in registry.versions(name)]


def version_of(reference: str, uri: str) -> str:
    """The reference ``models:/NAME/2`` of the version that an alias names now."""
    with open_registry(uri) as registry:
        return registry.resolve(reference).uri


@contextmanager
def pulled(reference: str, uri: str) -> Iterator[Path]:
    """Fetch the checkpoint folder of ``models:/NAME@alias`` or ``models:/NAME/2``, in a ``with`` block.

    Raises:
        InputError: no such model, version or alias.
    """
    import mlflow
    from mlflow.exceptions import MlflowException

    name, alias, version = parse(reference)
    client = mlflow.MlflowClient(uri)
    with TemporaryDirectory(prefix="espalier-") as target:
        try:
            entry = (
                client.get_model_version_by_alias(name, alias)
                if alias
                else client.get_model_version(name, version)
            )
            # by the client: mlflow.artifacts uses a URI that is global to the process
            artifact = dict(entry.tags).get("artifact", ARTIFACT)
            folder = Path(client.download_artifacts(str(entry.run_id), artifact, target))
        except (MlflowException, OSError) as error:
            reason = f"cannot be had from the registry ({refusal(error, uri)})"
            raise InputError("model", reference, reason) from None
        yield folder


def describe(record: Mapping[str, Any]) -> dict[str, str]:
    """Tags of a version, from the record of its checkpoint: its method and figures, and its ancestry."""
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
        tags["structured"] = format_cut(cut)
    return tags | {tag: str(record[key]) for tag, key in _LINEAGE.items() if record.get(key)}
