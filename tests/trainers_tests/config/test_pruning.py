"""What a recipe says about patterns, limits and the Fisher, and how it reaches the methods."""

from __future__ import annotations

import subprocess
import sys
from typing import Any, get_args

import pytest
import yaml
from pydantic import ValidationError

from pruners import METHODS, InputError, create_pruner
from pruners.methods.registry import SECOND_ORDER
from pruners.model.sparsity_pattern import Pattern
from trainers.config.pruning import FisherSettings, Method, PruningSettings


def settings(**values: Any) -> PruningSettings:
    return PruningSettings.model_validate(values)


def test_pruning__recipes_know_the_methods_that_there_are() -> None:
    assert set(get_args(Method)) == set(METHODS)
    assert {name for name in METHODS if create_pruner(name).gradients} == SECOND_ORDER


@pytest.mark.parametrize("method", METHODS)
def test_pruning__every_method_takes_the_options_of_a_recipe(method: str) -> None:
    fisher = {"gradients": 7, "block_size": {"QKV": 16}, "damp": 0.5, "double": True}
    pruner: Any = create_pruner(method, **settings(pattern="1x4", fisher=fisher).options(method))
    assert pruner.sparsity_pattern == Pattern.parse("1x4")
    if method in SECOND_ORDER:
        assert (pruner.gradients, pruner.block_size, pruner.damp) == (7, {"QKV": 16}, 0.5)
        assert pruner.double
        assert not pruner.relative  # a λ that is given is meant as it stands


@pytest.mark.parametrize("method", sorted(SECOND_ORDER))
@pytest.mark.parametrize("damp", [None, "auto"])
def test_pruning__what_a_recipe_leaves_open_is_the_methods_own(method: str, damp: str | None) -> None:
    chosen = settings(fisher={"damp": damp})
    pruner: Any = create_pruner(method, **chosen.options(method))
    own: Any = create_pruner(method)
    assert (pruner.gradients, pruner.damp, pruner.relative) == (own.gradients, own.damp, own.relative)
    assert chosen.tries_damps(method) is (damp == "auto")


def test_pruning__methods_without_a_fisher_try_no_damping() -> None:
    assert not settings(fisher={"damp": "auto"}).tries_damps("dimap")
    assert settings(fisher={"damp": "auto"}).options("dimap") == {"pattern": "unstructured"}


def test_pruning__a_relative_damping_is_passed_on() -> None:
    assert settings(fisher={"damp": 0.1, "relative": True}).options("ovit")["relative"] is True


@pytest.mark.parametrize(("text", "bytes_"), [("1GiB", 1 << 30), ("500MB", 500_000_000), (4096, 4096)])
def test_pruning__memory_is_read_with_its_unit(text: str | int, bytes_: int) -> None:
    settings = FisherSettings.model_validate({"memory": text})
    assert settings.memory == bytes_
    assert FisherSettings.model_validate_json(settings.model_dump_json()) == settings


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"pattern": "2:4", "sparsity": 0.75}, "sparsity: 2:4 leads to 0.5, no other"),
        ({"pattern": "4:2", "sparsity": 0.5}, "pattern: must be unstructured, N:M"),
        ({"pattern": "1x1"}, "pattern: must be unstructured, N:M"),
        ({"unfit": "drop"}, "'refuse' or 'dense'"),
        ({"floor": {"qkv": 1.5}}, "less than or equal to 1"),
        ({"table": {"qkv": -0.5}}, "greater than or equal to 0"),
        ({"floor": 0.8}, "nearest feasible: 0.8"),
        ({"ceiling": 0.5}, "nearest feasible: 0.5"),
        ({"fisher": {"damp": "automatic"}}, "auto"),
        ({"fisher": {"damp": 0}}, "greater than 0"),
        ({"fisher": {"block_size": {"QKV": 0}}}, "greater than or equal to 1"),
        ({"fisher": {"memory": "much"}}, "could not parse value and unit"),
        ({"fisher": {"gradients": 0}}, "greater than or equal to 1"),
        ({"methods": ["ovitt"]}, "'ovit'"),
        ({"fisher": {"rounds": 0}}, "a number of rounds from 1 to 100, or ascending sparsities"),
        ({"fisher": {"rounds": 101}}, "a number of rounds"),
        ({"fisher": {"rounds": 1.5}}, "a number of rounds"),
        ({"fisher": {"rounds": True}}, "a number of rounds"),
        ({"fisher": {"rounds": []}}, "a number of rounds"),
        ({"fisher": {"rounds": ["a"]}}, "a number of rounds"),
        ({"fisher": {"rounds": [0.0, 0.75]}}, "a number of rounds"),
        ({"fisher": {"rounds": [0.7, 0.6, 0.75]}}, "ascending"),
        ({"fisher": {"rounds": [0.5, 0.7]}}, r"fisher.rounds: must be ascending.*the last is 0\.75"),
        ({"reconstruct": -1}, "greater than or equal to 0"),
        ({"reconstruct": 1.5}, "valid integer"),
    ],
)
def test_pruning__what_cannot_be_is_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        settings(**values)


@pytest.mark.parametrize(("pattern", "sparsity"), [("2:4", 0.5), ("4:8", 0.5), ("1:4", 0.75)])
def test_pruning__a_pattern_with_its_own_sparsity_is_taken(pattern: str, sparsity: float) -> None:
    assert settings(pattern=pattern, sparsity=sparsity).pattern == pattern


def test_pruning__a_pattern_that_yaml_took_for_a_number_is_understood() -> None:
    read = yaml.safe_load("{pattern: 2:4, sparsity: 0.5}")
    assert read["pattern"] == 124
    assert settings(**read).pattern == "2:4"


def test_pruning__an_option_that_a_method_does_not_have_is_named() -> None:
    with pytest.raises(InputError, match=r"method = 'dimap'.*no such option.*damp"):
        create_pruner("dimap", damp=1e-3)


def test_pruning__settings_are_read_without_torch() -> None:
    code = (
        "import sys, trainers.config.training, orchestration.recipe.schema; sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_pruning__limits_and_tables_by_name_are_read_and_written_back() -> None:
    chosen = settings(
        floor={r"attn\..*": 0, r"mlp\.fc1": 0.25},
        ceiling={"head": 1},
        table={".*": 0.75},
        fisher={"block_size": {"QKV": 192, "MLP": 64}, "per_sample": True, "damp": "auto", "relative": True},
    )
    assert chosen.floor == {r"attn\..*": 0.0, r"mlp\.fc1": 0.25}
    assert chosen.ceiling == {"head": 1.0}
    assert chosen.fisher.per_sample
    assert PruningSettings.model_validate_json(chosen.model_dump_json()) == chosen
    assert "damp" not in chosen.options("ovit")
    assert chosen.options("ovit")["block_size"] == {"QKV": 192, "MLP": 64}


@pytest.mark.parametrize(
    ("rounds", "start", "end", "levels"),
    [
        (1, 0.0, 0.9, [0.9]),
        (2, 0.0, 0.96, [0.8, 0.96]),
        (2, 0.6, 0.9, [0.8, 0.9]),
        (3, 0.9, 0.9, [0.9]),
        ([0.5, 0.75, 0.9], 0.0, 0.9, [0.5, 0.75, 0.9]),
        ([0.5, 0.75, 0.9], 0.0, 0.6, [0.5, 0.6]),  # a pruning step on the way
        ([0.5, 0.75, 0.9], 0.6, 0.9, [0.75, 0.9]),
        ([0.5, 0.75, 0.9], 0.8, 0.85, [0.85]),
    ],
)
def test_pruning__a_step_has_the_rounds_on_its_way(
    rounds: int | list[float], start: float, end: float, levels: list[float]
) -> None:
    sparsity = rounds[-1] if isinstance(rounds, list) else end
    chosen = settings(sparsity=sparsity, fisher={"rounds": rounds})
    assert chosen.rounds("ovit", start, end) == pytest.approx(levels)
    assert chosen.rounds("dimap", start, end) == [end]  # it takes no gradients
    assert PruningSettings.model_validate_json(chosen.model_dump_json()) == chosen


def test_pruning__what_is_not_asked_for_is_not_written() -> None:
    """So results of earlier versions are found by the same names."""
    plain = settings().model_dump()
    assert "reconstruct" not in plain
    assert "rounds" not in plain["fisher"]
    asked = settings(reconstruct=8, fisher={"rounds": 2}).model_dump()
    assert (asked["reconstruct"], asked["fisher"]["rounds"]) == (8, 2)
