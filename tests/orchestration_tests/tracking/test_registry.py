"""The registry: versions, their aliases and tags."""

from __future__ import annotations

from pathlib import Path

import pytest

from orchestration.tracking import registry
from orchestration.tracking.server import Server
from orchestration.tracking.tracker import Tracker
from pruners.errors import InputError


@pytest.mark.cluster
def test_registry__versions_are_registered_once_and_pulled_by_alias(tracker: Tracker, tmp_path: Path) -> None:
    versions = []
    for method in ("dimap", "ovit"):
        folder = tmp_path / method
        folder.mkdir()
        (folder / "config.json").write_text(f'"{method}"')
        run = tracker.start(method, None, {}, {})
        tracker.folder(run, folder, "checkpoint")
        tags = registry.describe({"method": method, "sparsity": 0.75, "figures": {"val_top1": 0.9}})
        made = registry.register(tracker, "espalier-test", run, tags)
        assert registry.register(tracker, "espalier-test", run, tags) == made
        versions.append(made)
    assert versions == ["1", "2"]
    for version, method in zip(versions, ("dimap", "ovit"), strict=True):
        tracker.client.set_registered_model_alias("espalier-test", "champion", version)
        assert registry.version_of("models:/espalier-test@champion", tracker.uri).endswith(f"/{version}")
        with registry.pulled("models:/espalier-test@champion", tracker.uri) as folder:
            assert (folder / "config.json").read_text() == f'"{method}"'
        assert not folder.exists()
    with registry.pulled("models:/espalier-test/1", tracker.uri) as folder:
        assert (folder / "config.json").read_text() == '"dimap"'
    newest, oldest = [
        version for version in registry.versions(tracker.uri) if version.model == "espalier-test"
    ]
    assert (newest.uri, newest.aliases) == ("models:/espalier-test/2", ("champion",))
    assert (oldest.uri, oldest.aliases) == ("models:/espalier-test/1", ())
    assert oldest.tags == {"method": "dimap", "sparsity": "0.7500", "validation_top1": "0.900000"}
    assert (oldest.sparsity, oldest.top1, oldest.data) == (0.75, 0.9, "")


@pytest.mark.cluster
def test_registry__a_version_of_before_gets_what_it_lacks(tracker: Tracker, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    run = tracker.start("before", None, {}, {})
    tracker.folder(run, tmp_path, "checkpoint")
    registry.register(tracker, "espalier-before", run, {"method": "ovit"})
    record = {"method": "dimap", "parent": "d0", "data": "d1", "recipe_digest": "r", "git_commit": None}
    registry.register(tracker, "espalier-before", run, registry.describe(record))
    (version,) = tracker.client.search_model_versions("name='espalier-before'")
    assert version.tags == {
        "method": "ovit",  # what is there stays
        "sparsity": "0.0000",
        "validation_top1": "nan",
        "dense": "d0",
        "data": "d1",
        "recipe": "r",
    }
    assert tracker.has(run, "checkpoint/config.json")
    assert not tracker.has(run, "checkpoint/MLmodel")


@pytest.mark.cluster
@pytest.mark.parametrize(
    "reference", ["models:/absent@champion", "models:/absent/1", "models:/espalier", "models:/x@"]
)
def test_registry__what_the_registry_does_not_hold_is_one_line(running: Server, reference: str) -> None:
    with pytest.raises(InputError) as refused, registry.pulled(reference, running.uri):
        pass
    assert len(str(refused.value).splitlines()) == 1
    assert reference in str(refused.value)
