"""The list of a recipe's keys: all of them, with the defaults that hold, and none that is refused."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from orchestration.recipe.dotted_keys import flatten, put
from orchestration.recipe.loading import describe_shipped, load_recipe
from orchestration.recipe.reference import recipe_keys
from orchestration.recipe.schema import Recipe
from pruners.errors import InputError

MINIMAL = {
    "name": "x",
    "model": {"architecture": "vit_tiny_patch16_224", "pretrained": True, "classes": 10},
    "data": {"train": "train.parquet"},
    "pruning": {"sparsity": 0.5},
}


def everything(key: str) -> set[str]:
    return {key_below.name for key_below in recipe_keys(key)}


def test_reference__what_shipped_recipes_say_is_listed() -> None:
    parts = {known.name.partition(".")[0] for known in recipe_keys()}
    known = set.union(*map(everything, parts))
    for name, _ in describe_shipped():
        for key in flatten(load_recipe(name, []).model_dump(mode="json")):
            # of an open part (space, args) the recipe's own words come after a listed key
            assert any(key == listed or key.startswith(f"{listed}.") for listed in known), (name, key)


def test_reference__the_defaults_are_those_of_a_recipe() -> None:
    defaults = flatten(Recipe.model_validate(MINIMAL).model_dump(mode="json"))
    given = {
        "name",
        "model.architecture",
        "model.pretrained",
        "model.classes",
        "data.train",
        "pruning.sparsity",
    }
    listed = {known.name: known.default for known in recipe_keys()}
    written = {True: "true", False: "false", None: "null"}
    for key in (defaults.keys() & listed.keys()) - given:
        value = defaults[key]
        if isinstance(value, bool | None):
            assert listed[key] == written[value], key
        elif isinstance(value, int | float | str):
            assert listed[key] == str(value), key
    assert listed["name"] is None


def test_reference__a_key_that_is_not_listed_is_refused() -> None:
    listed = {known.name for known in recipe_keys()}
    assert "recovery.epocs" not in listed
    with pytest.raises(ValidationError, match="epocs"):
        Recipe.model_validate({**MINIMAL, "recovery": {"epocs": 3}})
    for key, value in {"dense.epochs": 3, "allocation.trials": 2, "resources.retries": 4}.items():
        assert key in listed
        content = dict(MINIMAL)
        put(content, key, value)
        assert flatten(Recipe.model_validate(content).model_dump(mode="json"))[key] == value


def test_reference__what_was_said_is_not_said_again() -> None:
    names = everything("")
    assert "recovery.lr.peak" not in names
    (short,) = (known for known in recipe_keys() if known.name == "recovery")
    assert short.text.endswith("its keys are those of dense")
    assert "recovery.lr.peak" in everything("recovery")
    assert everything("recovery.lr") == {name for name in everything("recovery") if ".lr." in name}


def test_reference__an_unknown_part_is_one_line() -> None:
    with pytest.raises(InputError, match=r"key = 'recovry': no recipe has it \(did you mean 'recovery'\?\)"):
        recipe_keys("recovry")


def test_reference__both_defaults_of_the_training_for_int8_are_said() -> None:
    """Left out it is 10 epochs; given without ``epochs`` it has those of all training."""
    listed = {known.name: known for known in recipe_keys("quantize")}
    wanted = {**MINIMAL, "quantize": {"mode": "qat"}}
    given = {**MINIMAL, "quantize": {"mode": "qat", "recovery": {}}}
    left_out, without = (Recipe.model_validate(content).quantize for content in (wanted, given))
    assert left_out is not None
    assert without is not None
    for key in ("epochs", "lr.kind", "lr.peak", "lr.floor"):
        first, second = (
            flatten(quantization.training.model_dump(mode="json"))[key]
            for quantization in (left_out, without)
            if quantization.training is not None
        )
        assert first != second
        row = listed[f"quantize.recovery.{key}"]
        assert row.default == f"{first} or {second}"
        assert f"{first} where quantize.recovery is left out" in row.text
    assert listed["quantize.recovery.batch_size"].default == "64"
