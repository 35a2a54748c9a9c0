"""MLflow answers page by page, and takes so much at once: nothing is dropped at these ends."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from orchestration.tracking import paging
from orchestration.tracking.paging import all_pages
from orchestration.tracking.registry import Registry
from orchestration.tracking.tracker import EndedRun, Tracker
from pruners.errors import InputError


@pytest.fixture(scope="module")
def uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    return f"sqlite:///{tmp_path_factory.mktemp('mlflow')}/mlflow.db"


@pytest.fixture
def tracker(uri: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Tracker]:
    """A database whose pages hold two."""
    monkeypatch.setattr(paging, "PAGE", 2)
    made = Tracker(uri, "tests")
    yield made
    made.abandon("KILLED")


def ended(number: int, parent: str, **more: int) -> EndedRun:
    return EndedRun(f"{number}", parent, more, {}, {"number": str(number)}, "FINISHED", 1.0)


def below(tracker: Tracker, run: str) -> list[str]:
    runs = tracker.client.search_runs([tracker.experiment], f"tags.`mlflow.parentRunId` = '{run}'")
    return sorted(run.data.tags["number"] for run in runs)


def test_paging__runs_are_deleted_when_all_pages_are_read(tracker: Tracker) -> None:
    """Of seven below a run three are known: as they were deleted on the way, pages moved under the reader."""
    run = tracker.start("search", None, {}, {})
    for number in range(7):
        tracker.log(ended(number, run))
    tracker.flush()
    assert sorted(tracker.children(run, "number", {"1", "2", "6"})) == ["1", "2", "6"]
    assert below(tracker, run) == ["1", "2", "6"]


def test_paging__all_that_was_left_open_below_a_run_is_ended(tracker: Tracker) -> None:
    run = tracker.start("search", None, {}, {})
    children = [tracker.start(str(number), run, {}, {"number": str(number)}) for number in range(5)]
    assert tracker.resume(run)
    assert {tracker.client.get_run(child).info.status for child in children} == {"KILLED"}


def test_paging__an_ended_run_keeps_all_its_parameters_and_figures(tracker: Tracker) -> None:
    run = tracker.start("search", None, {}, {})
    params = {f"key.{number}": number for number in range(230)}
    figures = {f"sparsity.{number}": 0.5 for number in range(1850)}
    sent = tracker.log(EndedRun("trial", run, params, figures, {}, "FINISHED", 1.0))
    logged = tracker.client.get_run(sent.result())
    assert len(logged.data.params) == 230
    assert len(logged.data.metrics) == 1850
    assert logged.info.status == "FINISHED"


def test_paging__models_and_versions_beyond_a_page_are_found(tracker: Tracker) -> None:
    registry = Registry(tracker.client)
    for number in range(5):
        tracker.client.create_registered_model(f"model-{number}")
    for _ in range(5):
        tracker.client.create_model_version("model-4", "there")
    assert registry.names() == [f"model-{number}" for number in range(5)]
    assert [version.version for version in registry.versions("model-4")] == ["5", "4", "3", "2", "1"]
    assert registry.resolve("models:/model-4/1").version == "1"
    with pytest.raises(
        InputError, match=r"model = 'modl-4': no such registered model \(did you mean 'model-4'\?"
    ):
        registry.versions("modl-4")


def test_paging__pages_are_asked_for_until_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    class Page(list[int]):
        token: str | None = None

    def search(first: int, *, max_results: int, page_token: str | None) -> Page:
        begin = int(page_token or first)
        page = Page(range(begin, min(begin + max_results, 2503)))
        page.token = str(begin + max_results) if begin + max_results < 2503 else None
        return page

    assert all_pages(search, 3) == list(range(3, 2503))
