"""What a population may search, and what it is refused for."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from orchestration.recipe.loading import load_recipe, single_run
from orchestration.recipe.population import job_key
from orchestration.recipe.search import ScheduleSearch

RATE = {"recovery.lr.peak": {"log": [1e-5, 1e-3]}}


def pbt(space: dict[str, Any], **changes: Any) -> ScheduleSearch:
    content = {"scheduler": "pbt", "sampler": "random", "trials": 3, "space": space, **changes}
    return ScheduleSearch.model_validate(content)


@pytest.mark.parametrize(
    "key",
    [
        "recovery.lr.peak",
        "recovery.lr.cycle_epochs",
        "recovery.weight_decay",
        "recovery.clip_grad",
        "recovery.layer_decay",
        "recovery.ema",
        "recovery.drop_path",
        "recovery.label_smoothing",
        "recovery.augment.mixup",
        "recovery.augment.flip",
        "recovery.distill.weight",
        "recovery.distill.temperature",
        "recovery.lr.peek",  # unknown keys are refused where their neighbours are known
    ],
)
def test_population__numbers_of_recovery_can_change_within_a_run(key: str) -> None:
    assert pbt({key: {"uniform": [0.1, 0.2]}}).space[key].uniform == (0.1, 0.2)


@pytest.mark.parametrize(
    "key",
    [
        "recovery.epochs",
        "recovery.batch_size",
        "recovery.accumulate",
        "recovery.lr.kind",
        "recovery.lr.cycle_peaks",
        "recovery.augment.shift",
        "recovery.augment.scale",
        "recovery.optimizer_args.eps",
        "recovery.checkpoint_minutes",
        "recovery.distill",
        "pruning.sparsity",
        "pruning.schedule.last_at",
        "pruning.fisher.damp",
    ],
)
def test_population__nothing_else_can(key: str) -> None:
    with pytest.raises(ValidationError, match=rf"scheduler: searches what can change .*; {key} cannot"):
        pbt({key: {"uniform": [0.1, 0.2]}})


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"trials": 1}, r"scheduler: a population needs trials: 2 at least \(1 given\)"),
        ({"sampler": "tpe"}, r"scheduler: .*needs sampler: random \(tpe given\)"),
        ({"sampler": "grid"}, r"scheduler: .*needs sampler: random \(grid given\)"),
        ({"space": {}}, "scheduler: a population needs a space"),
        (
            {"space": {**RATE, "recovery.epochs": {"integer": [1, 2]}}},
            "recovery.epochs is searched by integer",
        ),
        ({"space": {"recovery.lr.peak": {"choice": [1e-3, 1e-4]}}}, "recovery.lr.peak is searched by choice"),
        (
            {"space": {**RATE, "recovery.ema": {"uniform": [0.9, 0.99], "when": {"recovery.lr.peak": 1e-3}}}},
            "recovery.ema has a when",
        ),
    ],
)
def test_population__what_a_population_cannot_work_with(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(ValidationError, match=says):
        pbt(**{"space": RATE, **changes})
    assert pbt(RATE).runs == 3


def test_population__one_run_of_such_a_recipe_is_no_population() -> None:
    space = "schedule.space={recovery.lr.peak: {log: [1e-5, 1e-3]}}"
    recipe = load_recipe("demo", ["schedule.scheduler=pbt", "schedule.sampler=random", space])
    assert recipe.schedule.scheduler == "pbt"
    schedule = single_run(recipe, "dimap").schedule
    assert (schedule.trials, schedule.space, schedule.scheduler) == (1, {}, "none")
    assert load_recipe("demo").schedule.alone == {"trials": 1, "space": {}}


def test_population__where_a_job_has_it() -> None:
    assert job_key("recovery.lr.peak") == "training.lr.peak"
