"""The structured step for speed: what a recipe may say, which candidate is taken, what is recorded."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from helpers import quick
from hypothesis import given
from hypothesis import strategies as st
from image_tables import VIT, VIT_ARGS
from training_runs import make_files

from orchestration.preflight.checks import prepare
from orchestration.preflight.plan import _lines
from orchestration.recipe.validation import validate
from orchestration.state import latency_store as latency
from orchestration.sweep import structured as structured_phase
from orchestration.sweep.artifacts import Dense
from orchestration.sweep.structured import _Step, fastest_cut
from pruners.errors import InputError
from trainers.checkpoint.folder import load_checkpoint
from trainers.config.data import DataSettings
from trainers.config.engines import Choice
from trainers.config.structured import StructuredSettings
from trainers.engines.latency import Target, measure_models
from trainers.engines.registry import Placement

FAST: dict[str, Any] = {
    "objective": "latency",
    "candidates": [{"mlp": 0.75}, {"mlp": 0.5}, {"mlp": 0.25, "embed": 0.5}],
    "loss": 0.1,
    "images": 8,
    "batch_size": 4,
}


def recipe(structured: dict[str, Any]) -> Any:
    content = {"model": {"architecture": VIT, "args": VIT_ARGS, "classes": 10}, "dense": {"epochs": 1}}
    return validate({**content, "name": "fast", "data": {"source": "digits"}, "structured": structured})


def test_structured_latency__each_candidate_is_as_if_it_alone_had_been_asked_for() -> None:
    settings = StructuredSettings.model_validate({**FAST, "importance": "fisher", "recovery": None})
    rest = {"images": 8, "batch_size": 4, "importance": "fisher", "recovery": None}
    alone = tuple(StructuredSettings.model_validate({**rest, **one}) for one in FAST["candidates"])
    assert settings.choices() == alone
    assert all(one.choices() == (one,) for one in alone)
    assert StructuredSettings.model_validate(json.loads(settings.model_dump_json())) == settings


def test_structured_latency__a_step_that_is_not_for_speed_is_what_it_was() -> None:
    keys = {"objective", "candidates", "loss", "target"}
    assert not StructuredSettings(mlp=0.5).decides().keys() & keys
    assert StructuredSettings.model_validate(FAST).decides().keys() >= keys


@pytest.mark.parametrize(
    ("structured", "line"),
    [
        ({**FAST, "candidates": []}, "structured.candidates = []: needed, as [{mlp: 0.75}, {mlp: 0.5}]"),
        ({**FAST, "mlp": 0.5}, "structured.mlp = 0.5: with objective: latency widths belong in candidates"),
        ({**FAST, "loss": None}, "structured.loss: needed"),
        ({**FAST, "candidates": [{"mlp": 0.5}, {}]}, "candidates.1: nothing would be cut"),
        (
            {**FAST, "candidates": [{"mlp": 7.5}]},
            "structured.candidates.0.mlp = 7.5: must be a share that stays",
        ),
        ({**FAST, "candidates": [{"width": 1}]}, "structured.candidates.0.width = 1: unknown key"),
        ({**FAST, "objective": "size"}, "structured.objective = 'size': must be 'widths' or 'latency'"),
        (
            {**FAST, "target": {"engine": "tvm"}},
            "structured.target.engine = 'tvm': must be one of csr, sparse, torch",
        ),
        ({"mlp": 0.5, "loss": 0.1}, "structured.loss = 0.1: is for objective: latency alone"),
        ({"mlp": 0.5, "candidates": [{"mlp": 0.5}]}, "structured.candidates"),
        ({"mlp": 0.5, "target": {}}, "structured.target = {}: is for objective: latency alone"),
    ],
)
def test_structured_latency__what_contradicts_itself_is_one_line(
    structured: dict[str, Any], line: str
) -> None:
    with pytest.raises(InputError) as raised:
        recipe(structured)
    assert line in str(raised.value)


def test_structured_latency__every_candidate_must_be_a_shape_that_timm_can_hold() -> None:
    wrong = {**FAST, "candidates": [{"mlp": 0.5}, {"embed": 13}]}
    with pytest.raises(InputError, match=r"structured\.embed = 13: 13 channels cannot be divided"):
        prepare(recipe(wrong), dry_run=True)


def test_structured_latency__the_plan_says_what_is_looked_for() -> None:
    lines = dict(_lines(prepare(recipe(FAST), dry_run=True)))
    rule = "the fastest of 3 on csr:float32 (batch 1, threads 1) that loses at most 0.1; by taylor, "
    assert lines["structured"].startswith(rule)
    assert lines["the first"].startswith("mlp 64 → 48; ")


def candidate(top1: float, seconds: float) -> dict[str, Any]:
    return {"cut": {"mlp": [64, 32]}, "top1": top1, "latency": seconds}


def test_structured_latency__all_lose_too_much() -> None:
    with pytest.raises(
        RuntimeError, match=r"structured\.loss \(0\.1 .*mlp 64 → 32, loses 0\.125 before recovery"
    ):
        fastest_cut([candidate(0.7, 1.0), candidate(0.6, 0.5)], 0.1, 0.8)


@quick(100)
@given(st.lists(st.tuples(st.integers(0, 100), st.integers(1, 9)), min_size=1, max_size=9), st.floats(0, 1))
def test_structured_latency__nobody_within_the_loss_is_faster(
    points: list[tuple[int, int]], loss: float
) -> None:
    candidates = [candidate(top1 / 100, took) for top1, took in points]
    within = [one for one in candidates if one["top1"] >= 0.8 * (1 - loss) - 1e-9]
    if not within:
        with pytest.raises(RuntimeError, match=r"structured\.loss"):
            fastest_cut(candidates, loss, 0.8)
        return
    taken = candidates[fastest_cut(candidates, loss, 0.8)]
    assert taken in within
    assert taken["latency"] == min(one["latency"] for one in within)


class Here:
    """A sweep whose tasks run in this process, one after the other."""

    def __init__(self, files: dict[str, str], folder: Path) -> None:
        self.recipe = SimpleNamespace(structured=StructuredSettings.model_validate(FAST), seed=0)
        self.data = DataSettings(train=files["train"], validation=files["validation"])
        self.data_hash, self.lineage, self.storage = "d", {}, str(folder)
        self.lines: list[str] = []
        self.display = SimpleNamespace(say=self.lines.append)

    def task(self, function: Any) -> tuple[Any, str]:
        return SimpleNamespace(remote=function), "cpu"

    @contextmanager
    def scratch(self, name: str) -> Iterator[str]:
        yield f"{self.storage}/scratch/{name}"


def test_structured_latency__the_fastest_candidate_is_cut_and_all_are_recorded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tasks and cuts are real, times are given."""
    files = make_files(tmp_path / "files")
    monkeypatch.setattr(structured_phase.ray, "get", lambda result: result)
    monkeypatch.setattr(latency, "on_server", lambda target, function, *given: function(*given))
    asked: list[str] = []

    def times(checkpoints: list[str], target: Any) -> list[float]:
        asked.extend(checkpoints)
        return [3.0, 2.0, 4.0, 5.0]

    monkeypatch.setattr(latency, "times_of", times)
    here: Any = Here(files, tmp_path)
    dense = Dense(files["dense"], 0.0, "w")  # whose top-1 nobody can fall short of
    step = _Step(here, dense, "k")
    facts = step._cut_now()
    assert asked[-1] == files["dense"]
    assert len(asked) == 4
    assert facts["taken"] == 1
    assert facts["cut"] == {"mlp": [64, 32]}
    assert [one["cut"]["mlp"] for one in facts["candidates"]] == [[64, 48], [64, 32], [64, 16]]
    assert [one["latency"] for one in facts["candidates"]] == [3.0, 2.0, 4.0]
    assert all(0 <= one["top1"] <= 1 for one in facts["candidates"])
    cut = load_checkpoint(f"{tmp_path}/structured/k/cut").model
    assert cut.get_parameter("blocks.0.mlp.fc1.weight").shape == (32, 16)
    record = json.loads((tmp_path / "structured/k/cut/pruning.json").read_text())
    assert record["structured"]["candidates"] == facts["candidates"]
    assert "dense: 0.0 %, 5000.00 ms on csr:float32 (batch 1, threads 1)" in here.lines[0]
    assert "mlp 64 → 32: " in here.lines[2]


def test_structured_latency__whole_models_are_timed_in_their_order(tmp_path: Path) -> None:
    files = make_files(tmp_path / "files")
    target = Target(Choice.parse("torch"), Placement(1), 2)
    times = measure_models([Path(files["dense"])] * 2, target, rounds=1)
    assert len(times) == 2
    assert min(times) > 0
