"""A search for the fastest model: its recipe, its table, what a trial reports, and which one is taken."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from helpers import quick
from hypothesis import given
from hypothesis import strategies as st
from image_tables import VIT, VIT_ARGS, dense_folder, tiny
from one_shot_inputs import actor, one_shot_inputs

from orchestration.preflight.checks import prepare
from orchestration.preflight.plan import _lines
from orchestration.recipe.schema import Recipe
from orchestration.recipe.search import AllocationSearch, Fastest
from orchestration.recipe.validation import validate
from orchestration.reporting import plots
from orchestration.search.one_shot_trial import Speed
from orchestration.search.pareto import fastest, front
from orchestration.state import latency_store
from orchestration.state.latency_store import LatencyJob, format_times
from orchestration.state.trial_log import TrialRecord
from orchestration.sweep.tasks import measure
from pruners import find_layers
from pruners.errors import InputError
from trainers import optional_imports
from trainers.config.latency import LatencyTarget
from trainers.config.pruning import PruningSettings
from trainers.engines.latency import linear_shapes
from trainers.engines.latency_table import Curve, LatencyTable, LinearShape

FAST = {"objective": "latency", "between": [0.5, 0.95]}
RULE = Fastest(0.01, (0.5, 0.95), LatencyTarget())


def recipe(allocation: dict[str, Any], **changes: Any) -> Recipe:
    content = {"model": {"architecture": VIT, "args": VIT_ARGS, "classes": 10}, "dense": {"epochs": 1}}
    return validate(
        {**content, "name": "fast", "data": {"source": "digits"}, "allocation": allocation, **changes}
    )


def linear_table(falls: float = 0.5) -> LatencyTable:
    """Of the tiny ViT: each layer takes 1 ms, and with all zeros ``falls`` of that less."""
    model, _ = tiny(VIT)
    shapes = linear_shapes(model, find_layers(model))
    curve = Curve((0.0, 1.0), (1e-3, (1 - falls) * 1e-3))
    whole = Curve((0.0, 1.0), (10e-3, 10e-3 - 8e-3 * falls))
    return LatencyTable({}, whole, shapes, dict.fromkeys(shapes.values(), curve))


class Machine:
    """A machine that counts how often it is measured."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.processor, self.measured = "one", 0
        monkeypatch.setattr(latency_store, "describe_machine", self._describe)
        monkeypatch.setattr(latency_store, "measure", self._measure)

    def _describe(self) -> dict[str, Any]:
        return {
            "processor": self.processor,
            "instructions": ["avx2"],
            "cores": 2,
            "memory": 1,
            "load": self.measured,  # and whatever else changes from one minute to the next
            "system": "Linux",
            "versions": {"torch": "2.13", "timm": "1.0", "onnxruntime": "1.31"},
        }

    def _measure(self, *_: Any) -> tuple[Curve, dict[LinearShape, Curve]]:
        self.measured += 1
        table = linear_table()
        return table.whole, dict(table.curves)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    return Machine(monkeypatch)


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(dense_folder(tmp_path_factory.mktemp("model") / "dense"))


def job(dense: str, folder: Path, pruning: dict[str, Any] | None = None, **target: Any) -> LatencyJob:
    settings = PruningSettings.model_validate(pruning or {})
    return LatencyJob(dense, settings, LatencyTarget.model_validate(target), str(folder))


def test_latency_search__a_table_is_measured_once_for_a_machine_and_a_target(
    machine: Machine, dense: str, tmp_path: Path
) -> None:
    first, new = job(dense, tmp_path).run()
    assert new
    assert first.rest.seconds == pytest.approx((2e-3, 2e-3))
    assert job(dense, tmp_path, {"sparsity": 0.9}).run() == (first, False)
    assert machine.measured == 1
    (file,) = (tmp_path / "latency").iterdir()
    assert LatencyTable.from_json(json.loads(file.read_text())) == first
    assert first.about["machine"]["processor"] == "one"
    for number, other in enumerate(
        (
            job(dense, tmp_path, batch=4),
            job(dense, tmp_path, engine="torch"),
            job(dense, tmp_path, {"pattern": "1x4"}),
        ),
        start=2,
    ):
        assert other.run()[1]
        assert machine.measured == number
    machine.processor = "two"
    table, new = job(dense, tmp_path).run()
    assert (table.about["machine"]["processor"], new) == ("two", True)
    machine.processor = "one"
    assert job(dense, tmp_path).run() == (first, False)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"format": "espalier-latency-1"}'])
def test_latency_search__a_damaged_table_is_measured_anew(
    content: str, machine: Machine, dense: str, tmp_path: Path
) -> None:
    first, _ = job(dense, tmp_path).run()
    (file,) = (tmp_path / "latency").iterdir()
    file.write_text(content)
    assert job(dense, tmp_path).run() == (first, True)
    assert machine.measured == 2


def test_latency_search__a_table_that_tells_of_another_machine_is_not_read(
    machine: Machine, dense: str, tmp_path: Path
) -> None:
    """Even where somebody has given it the name of ours."""
    job(dense, tmp_path).run()
    (file,) = (tmp_path / "latency").iterdir()
    content = json.loads(file.read_text())
    content["about"]["machine"]["processor"] = "two"
    file.write_text(json.dumps(content))
    assert job(dense, tmp_path).run()[1]
    assert machine.measured == 2


def test_latency_search__more_threads_than_the_machine_has(
    machine: Machine, dense: str, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=r"allocation\.target\.threads = 9999: the machine that serves has"):
        job(dense, tmp_path, threads=9999).run()
    assert machine.measured == 0


def test_latency_search__a_table_is_told_in_a_line_even_if_zeros_gain_nothing() -> None:
    line = format_times(linear_table(), LatencyTarget())
    assert line == "csr:float32 (batch 1, threads 1): 10.00 ms dense, 6.40 ms with 90 % zeros"
    assert format_times(linear_table(0.0), LatencyTarget()).endswith("; zeros gain nothing on it")
    assert "17.20 ms with 90 % zeros; zeros gain nothing" in format_times(linear_table(-1.0), LatencyTarget())


def test_latency_search__the_short_form_and_its_defaults() -> None:
    search = recipe(FAST).allocation
    assert search.rule == RULE
    assert search.reach == (0.5, 0.95)
    assert str(RULE.target.choice) == "csr:float32"
    long = recipe({**FAST, "loss": 0.02, "target": {"engine": "openvino", "type": "bfloat16", "threads": 2}})
    assert isinstance(long.allocation.rule, Fastest)
    assert str(long.allocation.rule.target) == "openvino:bfloat16 (batch 1, threads 2)"
    assert recipe({}).allocation.rule is None
    assert recipe({**FAST, "trials": 0}).allocation.reach is None
    assert recipe({}).promotion.sparsity == 0.75
    assert recipe(FAST).promotion.sparsity == 0.5


def test_latency_search__studies_that_are_not_for_speed_are_what_they_were() -> None:
    keys = {"objective", "loss", "between", "target"}
    assert not AllocationSearch().decides().keys() & keys
    assert recipe(FAST).allocation.decides().keys() >= keys


@pytest.mark.parametrize(
    ("allocation", "line"),
    [
        (
            {"objective": "speed"},
            "allocation.objective = 'speed': must be 'top1', 'cross_entropy' or 'latency'",
        ),
        ({"objective": "latency"}, "allocation.between: needed, as [0.5, 0.95]: sparsities to look between"),
        ({**FAST, "between": [0.9, 0.5]}, "allocation.between = [0.9, 0.5]: 0.9 must lie below 0.5"),
        ({"loss": 0.01}, "allocation.loss = 0.01: is for objective: latency alone"),
        ({"target": {}}, "allocation.target = {}: is for objective: latency alone"),
        (
            {"pareto": {"tolerance": 0.1}, "between": [0.5, 0.9]},
            "allocation.between = [0.5, 0.9]: is for objective: latency alone; beside pareto it is",
        ),
        (
            {**FAST, "pareto": {"tolerance": 0.1}},
            "allocation.pareto = {'tolerance': 0.1}: objective: latency is a rule of its own; drop one",
        ),
        (
            {"pareto": {"against": "latency", "tolerance": 0.1}},
            "allocation.pareto.against = 'latency': must be 'macs' or 'size'; measured times are asked for",
        ),
        (
            {**FAST, "sampler": "cmaes"},
            "allocation.sampler = 'cmaes': cmaes knows one objective; with objective",
        ),
        (
            {**FAST, "first_images": 9},
            "allocation.first_images = 9: with objective: latency every trial sees all",
        ),
        (
            {**FAST, "sparsities": [0.6]},
            "allocation.sparsities = [0.6]: between is one search over all of them",
        ),
        ({**FAST, "loss": 2}, "allocation.loss = 2: must be less than or equal to 1"),
        (
            {**FAST, "target": {"engine": "opnvino"}},
            "allocation.target.engine = 'opnvino': must be one of csr, sparse, torch",
        ),
        ({**FAST, "target": {"engine": "opnvino"}}, "(did you mean 'openvino'?)"),
        ({**FAST, "target": {"engine": "compile"}}, "on no other can layers be timed alone"),
        (
            {**FAST, "target": {"engine": "openvino", "type": "int8"}},
            "allocation.target.type = 'int8': INT8 is made of a model that was chosen;",
        ),
        (
            {**FAST, "target": {"engine": "csr", "type": "bfloat16"}},
            "allocation.target.type = 'bfloat16': csr computes in float32",
        ),
        ({**FAST, "target": {"batch": 0}}, "allocation.target.batch = 0: must be greater than or equal to 1"),
        (
            {**FAST, "target": {"batches": 1}},
            "allocation.target.batches = 1: unknown key (did you mean 'batch'?)",
        ),
    ],
)
def test_latency_search__what_contradicts_itself_is_one_line(allocation: dict[str, Any], line: str) -> None:
    with pytest.raises(InputError) as raised:
        recipe(allocation)
    assert line in str(raised.value)


def test_latency_search__sparsities_that_the_pattern_does_not_allow() -> None:
    with pytest.raises(InputError, match=r"allocation\.between = .*2:4 leads to 0\.5, no other"):
        recipe(FAST, pruning={"pattern": "2:4", "sparsity": 0.5})


def test_latency_search__an_engine_that_is_not_installed_is_named_before_anything_starts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    find_spec = optional_imports.find_spec
    monkeypatch.setattr(
        optional_imports, "find_spec", lambda name: None if name == "openvino" else find_spec(name)
    )
    wanted = recipe({**FAST, "target": {"engine": "openvino"}})
    with pytest.raises(
        InputError, match=r"allocation\.target\.engine = .*needs openvino, which is not installed"
    ):
        prepare(wanted, dry_run=True)
    prepare(recipe({**FAST, "trials": 0, "target": {"engine": "openvino"}}), dry_run=True)


def test_latency_search__a_model_without_linear_layers_gains_nothing() -> None:
    convolutions = {"architecture": "resnet10t", "classes": 10, "args": {}}
    with pytest.raises(
        InputError, match=r"allocation\.objective = 'latency': no engine gains by zeros but in"
    ):
        prepare(recipe(FAST, model=convolutions), dry_run=True)


def test_latency_search__the_plan_says_what_is_looked_for() -> None:
    lines = dict(_lines(prepare(recipe({**FAST, "loss": 0.02}), dry_run=True)))
    assert lines["objectives"] == (
        "top-1 against latency from 0.5 to 0.95 on csr:float32 (batch 1, threads 1); "
        "the fastest that loses at most 0.02 of the dense model's top-1"
    )


def trial(number: int, top1: float, seconds: float, dense_top1: float = 0.8) -> TrialRecord:
    metrics = {"val_top1": top1, "latency": seconds, "latency_dense": 1.0, "dense_top1": dense_top1}
    return TrialRecord(number, {}, "finished", top1, metrics)


def test_latency_search__the_fastest_within_the_loss_is_taken() -> None:
    trials = [trial(0, 0.79, 0.9), trial(1, 0.792, 0.7), trial(2, 0.791, 0.5), trial(3, 0.81, 0.95)]
    assert fastest(trials, RULE).number == 1  # 1 % of 0.8 is 0.008: 0.792 lies within, to the rounding
    assert fastest(trials, Fastest(0.02, (0.5, 0.9), RULE.target)).number == 2
    assert fastest(trials, Fastest(0.0, (0.5, 0.9), RULE.target)).number == 3


def test_latency_search__all_lose_too_much() -> None:
    with pytest.raises(
        RuntimeError, match=r"allocation\.loss \(0\.01 of .* the nearest loses 0\.125, at 500\.00 ms"
    ):
        fastest([trial(0, 0.7, 0.5), trial(1, 0.6, 0.4)], RULE)
    with pytest.raises(RuntimeError, match="no trial ran to its end"):
        fastest([], RULE)


@quick(200)
@given(st.lists(st.tuples(st.integers(0, 100), st.integers(1, 50)), min_size=1, max_size=20), st.floats(0, 1))
def test_latency_search__nobody_within_the_loss_is_faster(points: list[tuple[int, int]], loss: float) -> None:
    trials = [trial(number, top1 / 100, took / 10) for number, (top1, took) in enumerate(points)]
    rule = Fastest(loss, (0.5, 0.9), RULE.target)
    least = 0.8 * (1 - loss) - 1e-9
    within = [trial for trial in trials if trial.metrics["val_top1"] >= least]
    if not within:
        with pytest.raises(RuntimeError, match=r"allocation\.loss"):
            fastest(trials, rule)
        return
    best = fastest(trials, rule)
    assert best in within
    assert best.metrics["latency"] == min(trial.metrics["latency"] for trial in within)
    assert best in front(trials, "latency")


def test_latency_search__the_figure_is_in_milliseconds() -> None:
    trials = [trial(0, 0.79, 0.004), trial(1, 0.8, 0.008)]
    axes = plots.search_front(trials, RULE, trials[1], "lamp").axes[0]
    drawn = {str(line.get_label()): list(line.get_xdata()) for line in axes.lines}
    assert drawn["chosen"] == [pytest.approx(8.0)]
    assert axes.get_xlabel() == "latency of a batch by the table (ms)"


def test_latency_search__a_trial_reports_what_its_model_will_take(dense: str, tmp_path: Path) -> None:
    """Without Ray: the actor's own steps, for the method's own allocation and for a sparser one."""
    search = AllocationSearch.model_validate({**FAST, "images": 8, "by": ["module"]})
    inputs = one_shot_inputs(dense, search, tmp_path)
    images, space = inputs.data, inputs.space
    speed = Speed(linear_table(), measure([dense], images, "validation", 0, "cpu", most=8)[0]["top1"])
    trial = actor(replace(inputs, speed=speed))
    own = trial.step()
    assert own["done"]
    assert own["images"] == 8
    assert own["latency_dense"] == pytest.approx(10e-3)
    pruned = [own["allocation"][name] / shape.numel for name, shape in speed.table.layers.items()]
    assert own["latency"] == pytest.approx(10e-3 - 0.5e-3 * sum(pruned))
    trial.reset_config({**space.own_values(), "sparsity": 0.9})
    sparser = trial.step()
    assert sparser["sparsity"] == pytest.approx(0.9, abs=1e-3)
    assert sparser["latency"] < own["latency"]
    trial.reset_config({**space.own_values(), "sparsity": 0.5})
    result = trial.step()
    assert result["dense_top1"] == speed.dense_top1 == own["dense_top1"]
    assert 0 <= result["dense_top1"] <= 1
