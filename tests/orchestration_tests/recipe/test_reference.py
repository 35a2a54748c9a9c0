"""The list of a recipe's keys: all of them, with the defaults that hold, and none that is refused."""

from __future__ import annotations

from typing import Any

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


def test_reference__every_key_has_a_meaning() -> None:
    parts = {known.name.partition(".")[0] for known in recipe_keys()}
    listed = [known for part in ("", *sorted(parts)) for known in recipe_keys(part)]
    assert len(listed) > 165
    # that its keys are listed elsewhere says nothing of the key itself
    assert {known.name for known in listed if not known.text or known.text.startswith("its keys")} == set()


def test_reference__an_unknown_part_is_one_line() -> None:
    with pytest.raises(InputError, match=r"key = 'recovry': no recipe has it \(did you mean 'recovery'\?\)"):
        recipe_keys("recovry")


@pytest.mark.parametrize("given", [{}, {"recovery": {}}, {"recovery": {"batch_size": 8, "lr": {}}}])
def test_reference__the_training_for_int8_has_its_own_defaults(given: dict[str, Any]) -> None:
    """Those of the paper, not those of other training, whichever of its keys are given."""
    listed = {known.name: known for known in recipe_keys("quantize")}
    quantization = Recipe.model_validate({**MINIMAL, "quantize": {"mode": "qat", **given}}).quantize
    assert quantization is not None
    assert quantization.training is not None
    settings = flatten(quantization.training.model_dump(mode="json"))
    own = {"epochs": 10, "lr.kind": "linear", "lr.peak": 1e-4, "lr.floor": 1e-5}
    for key, default in own.items():
        assert settings[key] == default
        assert listed[f"quantize.recovery.{key}"].default == f"{default}"
    assert listed["quantize.recovery.batch_size"].default == "64"
