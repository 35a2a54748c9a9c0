"""The typed recipe: what holds between its keys, and what it leaves unloaded."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel, ValidationError

from orchestration.common.hashing import digest
from orchestration.recipe.distribution import Distribution
from orchestration.recipe.loading import with_values
from orchestration.recipe.schema import PhaseResources, Recipe
from trainers.config.base import Settings
from trainers.config.pruning import PruningSettings
from trainers.config.schedules import LearningRate

ESPALIER = Path(sys.executable).parent / "espalier"
MINIMAL: dict[str, Any] = {
    "name": "a",
    "model": {"architecture": "vit_tiny_patch16_224", "pretrained": True},
    "data": {"train": "a.parquet"},
}


def test_schema__the_least_recipe() -> None:
    recipe = Recipe.model_validate(MINIMAL)
    assert recipe.pruning.methods == ("dimap", "ovit")
    assert recipe.registered_model == "espalier-a"
    named = MINIMAL | {"tracking": {"registered_model": "mine"}}
    assert Recipe.model_validate(named).registered_model == "mine"


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"model": {"architecture": "x"}}, "dense: needed"),
        ({"model": {"checkpoint": "y"}, "dense": {}}, "dense: not needed"),
        ({"model": {"architecture": "x", "checkpoint": "y"}}, "either architecture or checkpoint"),
        ({"model": {"checkpoint": "y", "pretrained": True}}, "drop pretrained and args"),
        ({"data": {}}, "either source or train"),
        ({"resources": {"workers": 65}}, "recovery.batch_size: 64 must be an image at least"),
        ({"pruning": {"floor": 0.8}}, "nearest feasible: 0.8"),
        ({"pruning": {"methods": []}}, "at least 1 item"),
        ({"name": "../x"}, "should match pattern"),
        ({"tracking": {"promotion": {"sparsity": 0.9}}}, "so many zeros; at most 0.75"),
        ({"storage": "  "}, "must not be empty"),
        (
            {"resources": {"long_run": {"workers": 9}}, "pruning": {"reconstruct": 8}},
            r"pruning.reconstruct: 8 must be an image at least for each of resources.workers \(9\)",
        ),
        ({"allocation": {"reconstruct": 8}}, "allocation.reconstruct: .* give pruning.reconstruct"),
        (
            {
                "pruning": {"fisher": {"rounds": [0.5, 0.75]}},
                "allocation": {"objective": "latency", "between": [0.6, 0.9]},
            },
            "pruning.fisher.rounds: must be a number where allocation.between chooses",
        ),
        (
            {
                "pruning": {"fisher": {"rounds": 2}},
                "allocation": {"pareto": {"between": [0.8, 0.9], "tolerance": 0.1}},
            },
            r"pruning.sparsity: must not lie below allocation.pareto.between \(0.8\)",
        ),
        ({"schedule": {"space": {"model.classes": {"choice": [1]}}}}, "only keys of recovery and pruning"),
    ],
)
def test_schema__what_contradicts_itself(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(ValidationError, match=says):
        Recipe.model_validate(MINIMAL | changes)


def test_schema__a_champion_is_as_sparse_as_the_recipe_unless_it_says_otherwise() -> None:
    assert Recipe.model_validate(MINIMAL | {"pruning": {"sparsity": 0.8}}).promotion.sparsity == 0.8
    own = {"pruning": {"sparsity": 0.8}, "tracking": {"promotion": {"sparsity": 0.6, "tolerance": None}}}
    assert Recipe.model_validate(MINIMAL | own).promotion.model_dump() == {"sparsity": 0.6, "tolerance": None}
    space = {"pruning.sparsity": {"uniform": [0.6, 0.9]}}
    searched = {"pruning": {"sparsity": 0.8}, "schedule": {"space": space}}
    assert Recipe.model_validate(MINIMAL | searched).promotion.sparsity == 0.6
    searched |= {"tracking": {"promotion": {"sparsity": 0.85}}}
    assert Recipe.model_validate(MINIMAL | searched).promotion.sparsity == 0.85


def test_schema__pretrained_weights_may_be_fine_tuned() -> None:
    assert Recipe.model_validate(MINIMAL | {"dense": {"epochs": 2}}).dense is not None


def test_schema__the_structured_step_may_have_other_resources() -> None:
    own = {"workers": 8, "structured": {"workers": 2}}
    recovery = {"batch_size": 2}
    recipe = Recipe.model_validate(
        {**MINIMAL, "resources": own, "structured": {"mlp": 0.5, "recovery": recovery}}
    )
    assert recipe.resources.of("structured").workers == 2
    assert recipe.resources.of("schedule").workers == 8
    shared = {
        "workers": 8,
        "gpus_per_worker": 1,
        "cpus_per_worker": 4,
        "long_run": {"workers": {"min": 2, "max": 4}},
    }
    inherited = Recipe.model_validate(MINIMAL | {"resources": shared}).resources
    assert inherited.of("long_run").gpus_per_worker == 1
    assert inherited.of("long_run").most == 4
    again = Recipe.model_validate(MINIMAL | {"resources": inherited.model_dump(mode="json")}).resources
    assert again == inherited
    with pytest.raises(ValueError, match=r"structured\.recovery\.batch_size: 1 must be an image"):
        Recipe.model_validate(
            {**MINIMAL, "resources": own, "structured": {"mlp": 0.5, "recovery": {"batch_size": 1}}}
        )


def test_schema__batches_of_other_phases_are_not_held_against_the_workers_of_one() -> None:
    resources = {"workers": 2, "retries": 3, "long_run": {"workers": 9}}
    recipe = Recipe.model_validate(
        MINIMAL | {"dense": {"batch_size": 8}, "resources": resources, "long_run": {"recovery.epochs": 3}}
    )
    alone = recipe.in_phase("long_run")
    assert alone.resources == PhaseResources(workers=9, retries=3)
    assert with_values(alone, {}) is alone
    assert recipe.in_phase("schedule") is recipe
    assert alone.model_copy(update={"resources": recipe.resources}) == recipe


def test_schema__without_a_space_there_is_one_gradual_run() -> None:
    recipe = Recipe.model_validate(MINIMAL | {"schedule": {"trials": 5}})
    assert recipe.schedule.runs == 1
    space = {"recovery.lr.peak": {"log": [1e-4, 1e-3]}}
    searched = Recipe.model_validate(MINIMAL | {"schedule": {"trials": 5, "space": space}})
    assert searched.schedule.runs == 5


def test_schema__values_never_change_after_reading() -> None:
    recipe = Recipe.model_validate(MINIMAL)
    with pytest.raises(ValidationError, match="frozen"):
        recipe.seed = 3  # type: ignore[misc]


def parts(kind: type[BaseModel]) -> set[type[BaseModel]]:
    """Every pydantic model below one."""
    kinds = {kind}
    for field in kind.model_fields.values():
        text = [field.annotation, *getattr(field.annotation, "__args__", ())]
        for inner in text:
            if isinstance(inner, type) and issubclass(inner, BaseModel):
                kinds |= parts(inner)
    return kinds


def test_schema__no_part_takes_unknown_keys() -> None:
    assert len(parts(Recipe)) >= 11
    assert all(issubclass(kind, Settings) for kind in parts(Recipe))
    assert all(kind.model_config["extra"] == "forbid" for kind in parts(Recipe))


@pytest.mark.parametrize(
    ("content", "right"),
    [
        ({"uniform": [0, 1]}, True),
        ({"log": [1e-5, 1e-1]}, True),
        ({"integer": [2, 2]}, True),
        ({"choice": ["a", 1, 0.5]}, True),
        ({}, False),
        ({"uniform": [0, 1], "choice": [1]}, False),
        ({"uniform": [1, 0]}, False),
        ({"log": [0, 1]}, False),
        ({"integer": [0.5, 2]}, False),
        ({"choice": []}, False),
    ],
)
def test_schema__distributions(content: dict[str, Any], right: bool) -> None:
    if right:
        assert Distribution.model_validate(content)
        return
    with pytest.raises(ValidationError):
        Distribution.model_validate(content)


def test_schema__pruning_and_rates_hold_together() -> None:
    with pytest.raises(ValidationError, match="must not lie above peak"):
        LearningRate(peak=1e-4, floor=1e-3)
    with pytest.raises(ValidationError, match="must not name one twice"):
        PruningSettings(methods=("dimap", "dimap"))
    with pytest.raises(ValidationError, match="drop scope"):
        PruningSettings(scope="layer", table={"qkv": 0.75})


def test_schema__the_digest_follows_the_content() -> None:
    assert digest({"a": 1, "b": 2}) == digest({"b": 2, "a": 1})
    assert digest({"a": 1}) != digest({"a": 2})
    assert len(digest("x")) == 12


def seconds(call: Callable[[], object], enough: float) -> float:
    """Of a processor, in the processes that a call starts: the least of some tries, as two that share a core
    are slower than one alone.
    """
    times: list[float] = []
    while len(times) < 10 and not (times and min(times) < enough):
        before = os.times()
        call()
        after = os.times()
        times.append(
            after.children_user + after.children_system - before.children_user - before.children_system
        )
    return min(times)


@pytest.mark.parametrize(
    ("arguments", "status"),
    [(["--help"], 0), (["sweep", "--help"], 0), (["sweep", "demo", "pruning.sparsty=0.5"], 2), (["swep"], 2)],
)
def test_schema__help_and_mistakes_answer_at_once(arguments: list[str], status: int) -> None:
    def answer() -> None:
        done = subprocess.run([ESPALIER, *arguments], capture_output=True, text=True, check=False)
        assert done.returncode == status, done.stderr
        assert (done.stdout if status == 0 else done.stderr).strip()

    assert 0 < seconds(answer, 0.6) < 0.6


@pytest.mark.parametrize("arguments", [["--help"], ["sweep", "demo", "pruning.sparsty=0.5"], ["recipes"]])
def test_schema__help_and_mistakes_import_nothing_heavy(arguments: list[str]) -> None:
    code = f"""
import sys
sys.argv = ["espalier", *{arguments!r}]
from orchestration.cli.app import main
try:
    main()
except SystemExit:
    print()
    print(sorted({{"torch", "ray", "mlflow", "optuna", "timm", "pyarrow", "numpy"}} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
