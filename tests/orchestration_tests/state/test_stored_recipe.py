"""The recipe in a sweep's folder: what it holds, what it does not, and when another one is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from orchestration.recipe.loading import load_recipe, single_run
from orchestration.recipe.schema import Recipe
from orchestration.state.stored_recipe import changes, check_unchanged, load, store, sweep_names
from pruners.errors import InputError

DATA = ("data={train: some/train.parquet, test: 's3://key:secret@bucket/test.parquet'}", "model.classes=3")


def recipe(folder: Path | str, *overrides: str) -> Recipe:
    return load_recipe("demo", [f"storage={folder}", *overrides])


def test_stored_recipe__what_is_stored_runs_again(tmp_path: Path) -> None:
    first = recipe(tmp_path, "pruning.sparsity=0.6", "pruning.pattern=1x4", "recovery.lr.peak=1e-5")
    store(first)
    assert load(str(tmp_path), "demo") == first


def test_load__overrides_go_before_what_is_stored(tmp_path: Path) -> None:
    store(recipe(tmp_path, "pruning.sparsity=0.6", "recovery.lr.peak=1e-5"))
    again = load(str(tmp_path), "demo", ["recovery.lr.peak=2e-5", "name=other"])
    assert again == recipe(tmp_path, "pruning.sparsity=0.6", "recovery.lr.peak=2e-5", "name=other")
    with pytest.raises(InputError, match=r"recovery\.lr\.peek"):
        load(str(tmp_path), "demo", ["recovery.lr.peek=2e-5"])


def test_stored_recipe__it_holds_no_login_and_whole_paths(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    uri = "http://me:hunter2@mlflow.example:5000"
    store(recipe("runs", f"tracking.uri={uri}", *DATA))
    text = (tmp_path / "runs/sweeps/demo/recipe.json").read_text(encoding="utf-8")
    assert "hunter2" not in text
    assert "secret" not in text
    content = json.loads(text)
    assert content["tracking"]["uri"] == "http://mlflow.example:5000"
    assert content["data"]["train"] == f"{tmp_path}/some/train.parquet"
    assert "storage" not in content
    # the environment knows the login that was left out
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    assert load("runs", "demo").tracking.uri == uri
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://me:hunter2@another.example:5000")
    assert load("runs", "demo").tracking.uri == "http://mlflow.example:5000"


def test_stored_recipe__places_are_stored_as_they_were_given(tmp_path: Path) -> None:
    teacher = "recovery.distill={teacher: 's3://key:secret@bucket/teacher@1'}"
    train = "data={train: 's3://bucket/imagenet@2024/train', test: 'abfs://box@account/test'}"
    given = recipe(tmp_path, train, "model.classes=3", "tracking.uri='sqlite:////home/me@host/x.db'", teacher)
    store(given)
    again = load(str(tmp_path), "demo")
    assert again.data == given.data
    assert again.tracking.uri == given.tracking.uri
    distill = again.recovery.distill
    assert distill is not None
    assert distill.teacher == "s3://bucket/teacher@1"


def test_stored_recipe__a_sweep_moves_with_its_storage(tmp_path: Path) -> None:
    store(recipe(tmp_path / "a"))
    (tmp_path / "a").rename(tmp_path / "b")
    assert load(str(tmp_path / "b"), "demo").storage == str(tmp_path / "b")


@pytest.mark.parametrize(
    "override",
    [
        "allocation.trials=99",
        "allocation.cpus_per_trial=2",
        "allocation.failures=0.9",
        "schedule.trial_minutes=60",
        "allocation.sparsities=[0.5, 0.6]",
        "long_run={recovery.epochs: 3}",
        "schedule.trials=99",
        "resources={workers: {min: 1, max: 2}, retries: 5}",
        "tracking.experiment=another",
        "pruning.methods=[ovit]",
        "description=words",
    ],
)
def test_stored_recipe__what_a_sweep_may_go_on_with(tmp_path: Path, override: str) -> None:
    store(recipe(tmp_path))
    check_unchanged(recipe(tmp_path, override))


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("pruning.sparsity=0.8", "pruning.sparsity: 0.75 → 0.8"),
        ("seed=1", "seed: 0 → 1"),
        ("allocation.sampler=random", "allocation.sampler: tpe → random"),
        ("pruning.floor=0.1", "pruning.floor: 0.0 → 0.1"),
        ("schedule.space={recovery.lr.peak: {log: [1e-4, 1e-3]}}", "schedule.space."),
    ],
)
def test_stored_recipe__another_recipe_is_refused(tmp_path: Path, override: str, says: str) -> None:
    store(recipe(tmp_path))
    with pytest.raises(InputError, match="was begun with another recipe") as error:
        check_unchanged(recipe(tmp_path, override))
    assert says in str(error.value)
    assert "--as NEW" in str(error.value)
    check_unchanged(recipe(tmp_path, override, "name=another"))


def test_stored_recipe__many_differences_are_counted(tmp_path: Path) -> None:
    store(recipe(tmp_path))
    overrides = [f"recovery.augment.{key}=0.5" for key in ("flip", "erasing", "mixup", "cutmix")]
    changed = recipe(
        tmp_path, *overrides, "seed=3", "recovery.lr.peak=1e-5", "recovery.ema=0.9", "dense.lr.peak=7e-3"
    )
    with pytest.raises(InputError, match=r"and 2 more\)"):
        check_unchanged(changed)


def test_stored_recipe__one_run_is_a_part_of_its_sweep(tmp_path: Path) -> None:
    whole = recipe(tmp_path)
    single = single_run(whole, "ovit")
    assert changes(whole, single) == {}
    assert changes(single, whole) == {}
    assert changes(single, single_run(whole, "dimap")) == {}
    other = single_run(recipe(tmp_path, "pruning.sparsity=0.8"), "ovit")
    assert changes(whole, other) == {"pruning.sparsity": (0.75, 0.8)}


def test_stored_recipe__the_same_data_by_another_path_is_no_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    store(recipe(tmp_path, *DATA))
    whole = DATA[0].replace("some/", f"{tmp_path}/some/")
    check_unchanged(recipe(tmp_path, whole, DATA[1]))


def test_stored_recipe__unknown_sweeps_are_met_with_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no sweep has been run there"):
        sweep_names(str(tmp_path))
    store(recipe(tmp_path))
    with pytest.raises(InputError, match="did you mean 'demo'"):
        load(str(tmp_path), "dmeo")


def test_stored_recipe__a_sweep_of_before_has_no_recipe(tmp_path: Path) -> None:
    (tmp_path / "sweeps/old").mkdir(parents=True)
    with pytest.raises(InputError, match="has stored no recipe"):
        load(str(tmp_path), "old")
    check_unchanged(recipe(tmp_path, "name=old"))


def test_stored_recipe__a_recipe_that_is_no_recipe_is_named(tmp_path: Path) -> None:
    store(recipe(tmp_path))
    file = tmp_path / "sweeps/demo/recipe.json"
    content: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    content["pruning"]["sparsty"] = 0.5
    file.write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(InputError, match=r"pruning\.sparsty"):
        load(str(tmp_path), "demo")
