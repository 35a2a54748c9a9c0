"""Recipes from YAML: inheritance, overrides, numbers, and one line for each mistake."""

from __future__ import annotations

import pickle
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from helpers import quick
from hypothesis import example, given
from hypothesis import strategies as st

from orchestration.recipe.dotted_keys import flatten, get, put
from orchestration.recipe.loading import describe_shipped, load_recipe, shipped, single_run, with_values
from orchestration.recipe.schema import Recipe
from orchestration.recipe.validation import validate
from pruners.errors import InputError

MINIMAL = """
model: {architecture: vit_tiny_patch16_224, pretrained: true, classes: 10}
data: {train: train.parquet}
"""


@pytest.fixture(autouse=True)
def _no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("ESPALIER_STORAGE", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(name, raising=False)


def recipe(folder: Path, name: str, text: str) -> str:
    path = folder / f"{name}.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return str(path)


@pytest.mark.parametrize("name", sorted(shipped()))
def test_loading__every_shipped_recipe_is_valid(name: str) -> None:
    recipe_read = load_recipe(name)
    assert recipe_read.description
    assert load_recipe(str(shipped()[name])) == recipe_read
    assert validate(yaml.safe_load(yaml.safe_dump(recipe_read.model_dump(mode="json")))) == recipe_read
    for method in recipe_read.pruning.methods:
        assert single_run(recipe_read, method).pruning.methods == (method,)


def test_loading__shipped_recipes_are_described() -> None:
    described = dict(describe_shipped())
    assert "demo" in described
    assert all(text and "\n" not in text for text in described.values())
    assert load_recipe("experiments/demo.yaml") == load_recipe("demo")


def test_loading__a_name_comes_from_the_file(tmp_path: Path) -> None:
    assert load_recipe(recipe(tmp_path, "mine", MINIMAL)).name == "mine"
    assert load_recipe(recipe(tmp_path, "mine", MINIMAL + "name: other\n")).name == "other"


def test_loading__extends(tmp_path: Path) -> None:
    recipe(tmp_path, "bases/base", MINIMAL + "seed: 1\npruning: {sparsity: 0.5, floor: 0.1}\n")
    recipe(tmp_path, "middle", "extends: bases/base.yaml\npruning: {sparsity: 0.6}\nname: middle\n")
    recipe_read = load_recipe(
        recipe(tmp_path, "top", "extends: middle.yaml\nseed: 2\npruning: {methods: [ovit]}\n")
    )
    assert (recipe_read.seed, recipe_read.name) == (2, "middle")
    assert (recipe_read.pruning.sparsity, recipe_read.pruning.floor, recipe_read.pruning.methods) == (
        0.6,
        0.1,
        ("ovit",),
    )


def test_loading__extends_a_shipped_recipe(tmp_path: Path) -> None:
    recipe_read = load_recipe(recipe(tmp_path, "mine", "extends: demo\nrecovery: {lr: {peak: 2e-4}}\n"))
    demo = load_recipe("demo")
    assert recipe_read.recovery.lr.peak == 2e-4
    assert recipe_read.recovery.lr.floor == demo.recovery.lr.floor
    assert recipe_read.model == demo.model


@pytest.mark.parametrize("length", [1, 3])
def test_loading__circles_are_refused(length: int, tmp_path: Path) -> None:
    for number in range(length):
        recipe(tmp_path, f"r{number}", f"extends: r{(number + 1) % length}.yaml\n")
    with pytest.raises(InputError, match="goes round in a circle"):
        load_recipe(str(tmp_path / "r0.yaml"))


def test_loading__one_base_for_two(tmp_path: Path) -> None:
    """What two recipes share is no circle."""
    recipe(tmp_path, "base", MINIMAL)
    recipe(tmp_path, "middle", "extends: base.yaml\n")
    assert load_recipe(recipe(tmp_path, "top", "extends: middle.yaml\n")).model.classes == 10


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),
        ("1E-4", 1e-4),
        ("2.5e-3", 2.5e-3),
        ("5e+1", 50.0),
        (".5e-1", 0.05),
        ("1.e-2", 0.01),
        ("0.001", 0.001),
        ("3", 3.0),
    ],
)
def test_loading__numbers(text: str, value: float, tmp_path: Path) -> None:
    path = recipe(tmp_path, "r", MINIMAL + f"recovery: {{lr: {{peak: {text}}}}}\n")
    assert load_recipe(path).recovery.lr.peak == value
    assert load_recipe(path, ["recovery.lr.peak=7", f"recovery.lr.peak={text}"]).recovery.lr.peak == value


def test_loading__numbers_where_any_type_will_do() -> None:
    """Where the schema would not turn text into a number, YAML must."""
    recipe_read = load_recipe(
        "demo", ["model.args.drop_rate=1e-4", "schedule.space={recovery.lr.peak: {choice: [1e-3]}}"]
    )
    assert recipe_read.model.args["drop_rate"] == 1e-4
    assert recipe_read.schedule.space["recovery.lr.peak"].choice == (1e-3,)


def test_loading__text_that_looks_like_a_number_stays_text(tmp_path: Path) -> None:
    assert load_recipe(recipe(tmp_path, "r", MINIMAL + "description: e10 by 1e\n")).description == "e10 by 1e"


def test_loading__overrides() -> None:
    recipe_read = load_recipe(
        "demo",
        [
            "pruning.methods=[ovit]",
            "pruning.sparsity=0.9",
            "tracking.uri=http://host:5000/a=b",
            "recovery.clip_grad=null",
            "schedule.space={}",
        ],
    )
    assert recipe_read.pruning.methods == ("ovit",)
    assert recipe_read.pruning.sparsity == 0.9
    assert recipe_read.tracking.uri == "http://host:5000/a=b"
    assert recipe_read.recovery.clip_grad is None
    assert recipe_read.schedule.space == {}


def test_loading__storage_and_tracking_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ESPALIER_STORAGE", "s3://bucket/runs")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://host:5000")
    recipe_read = load_recipe("demo")
    assert (recipe_read.storage, recipe_read.tracking.uri) == ("s3://bucket/runs", "http://host:5000")
    assert load_recipe("demo", ["storage=here"]).storage == "here"


@pytest.mark.parametrize(
    ("override", "key", "says"),
    [
        ("pruning.sparsty=1", "pruning.sparsty", "did you mean 'sparsity'?"),
        ("recovery.lr.peek=1", "recovery.lr.peek", "did you mean 'peak'?"),
        ("dense.augment.flp=1", "dense.augment.flp", "did you mean 'flip'?"),
        ("prunning.sparsity=1", "prunning", "did you mean 'pruning'?"),
        ("pruning.methods=[ovitt]", "pruning.methods.0", "did you mean 'ovit'?"),
        ("recovery.lr.kind=cosin", "recovery.lr.kind", "did you mean 'cosine'?"),
        ("allocation.by=[stages]", "allocation.by.0", "did you mean 'stage'?"),
        ("allocation.sampler=tp", "allocation.sampler", "did you mean 'tpe'?"),
        ("zzz=1", "zzz", "unknown key"),
        ("pruning.zzz.deep=1", "pruning.zzz", "unknown key"),
        ("model.classes=ten", "model.classes", "must be a valid integer"),
        ("model=3", "model", "must be a valid dictionary"),
        ("data.mean=[1,2]", "data.mean", ""),
        ("name=a/b", "name", "pattern"),
        ("=3", "", ""),
        ("pruning.=3", "pruning.", ""),
    ],
)
def test_loading__mistakes_are_named(override: str, key: str, says: str) -> None:
    with pytest.raises(InputError) as error:
        load_recipe("demo", [override])
    assert error.value.key.startswith(key)
    assert says in str(error.value)
    assert "\n" not in str(error.value)


def test_loading__flatten_put_get() -> None:
    content: dict[str, Any] = {"a": {"b": 1, "c": {}}, "d": [1]}
    assert flatten(content) == {"a.b": 1, "a.c": {}, "d": [1]}
    put(content, "a.c.e", 2)
    put(content, "f.g", 3)
    assert content == {"a": {"b": 1, "c": {"e": 2}}, "d": [1], "f": {"g": 3}}
    assert (get(content, "a.c.e"), get(content, "a.x"), get(content, "a.b.y")) == (2, None, None)
    with pytest.raises(InputError, match="b holds a value"):
        put(content, "a.b.c", 1)


def outcome(call: Callable[[], Recipe]) -> str:
    """Nothing for a recipe, the message for an input error; whatever else is raised goes on."""
    try:
        assert isinstance(call(), Recipe)
    except InputError as error:
        return str(error) or "nothing said"
    return ""


@pytest.mark.parametrize(
    "value",
    [
        "2001-99-99",
        "!!int x",
        "!!float x",
        "!!python/object:os.system {}",
        "[" * 1500,
        "&a [*a]",
        "{[1]: 2}",
        "=",
    ],
)
def test_loading__yaml_that_only_looks_right(value: str, tmp_path: Path) -> None:
    lines = [
        outcome(lambda: load_recipe("demo", [f"pruning.sparsity={value}"])),
        outcome(lambda: load_recipe(recipe(tmp_path, "r", MINIMAL + f"seed: {value}\n"))),
    ]
    assert all(text and "\n" not in text for text in lines)


@pytest.mark.parametrize("value", ["&a [*a]", "&a {b: [1, *a]}", "&a !!pairs [{b: *a}]"])
def test_loading__a_value_that_holds_itself_is_refused_where_any_value_may_stand(value: str) -> None:
    for key in ("recovery.optimizer_args.momentum", "model.args.depths", "long_run"):
        assert "a value holds itself" in outcome(lambda: load_recipe("demo", [f"{key}={value}"]))  # noqa: B023


def test_loading__an_anchor_may_stand_in_many_places() -> None:
    loaded = load_recipe(
        "demo", ["recovery.optimizer_args.betas=[&b 0.9, *b]", "model.args.depths=[&a [1], *a]"]
    )
    assert loaded.model.args["depths"] == [[1], [1]]
    assert loaded.recovery.optimizer_args["betas"] == [0.9, 0.9]


def test_loading__names_that_no_file_can_have() -> None:
    assert "no such file or recipe" in outcome(lambda: load_recipe("x" * 5000))
    assert "no such file or recipe" in outcome(lambda: load_recipe("a\0b"))


KEYS = st.text("abcdefgh", min_size=1, max_size=3)
TREES = st.recursive(
    st.integers(), lambda inner: st.dictionaries(KEYS, inner, min_size=1, max_size=3), max_leaves=12
)


@quick(100)
@given(st.dictionaries(KEYS, TREES, max_size=4))
def test_loading__flatten_is_undone_by_put(content: dict[str, Any]) -> None:
    again: dict[str, Any] = {}
    for key, value in flatten(content).items():
        assert get(content, key) == value
        put(again, key, value)
    assert again == content


def test_loading__values_in_place_of_the_recipe_s() -> None:
    demo = load_recipe("demo")
    before = demo.recovery.lr.peak
    changed = with_values(demo, {"recovery.lr.peak": 2e-3, "pruning.schedule.steps": 3})
    assert (changed.recovery.lr.peak, changed.pruning.schedule.steps) == (2e-3, 3)
    assert demo.recovery.lr.peak == before != 2e-3
    assert with_values(changed, {"recovery.lr.peak": before, "pruning.schedule.steps": 2}) == demo


def test_loading__a_single_run() -> None:
    single = single_run(load_recipe("demo"), "ovit")
    assert single.pruning.methods == ("ovit",)
    assert (single.allocation.trials, single.schedule.trials, single.schedule.space) == (0, 1, {})


FLAT = sorted(flatten(load_recipe("demo").model_dump(mode="json")))
ANY = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=12)
    | st.sampled_from(["ovit", "stage", "1e-4", "", ".nan", "~", "tpe"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6) | st.integers(), inner),
    max_leaves=6,
)
PLACES = st.sampled_from([*FLAT, *sorted({key.rpartition(".")[0] for key in FLAT} - {""}), "extends"])


@quick(150)
@example([("dense.preset", [])])
@given(st.lists(st.tuples(PLACES | st.text(max_size=8), ANY), min_size=1, max_size=3))
def test_loading__any_recipe_is_read_or_refused(changes: list[tuple[str, Any]]) -> None:
    """Whatever is put into the demo: a recipe, or one line about it."""
    content = load_recipe("demo").model_dump(mode="json")

    def changed() -> Recipe:
        for key, value in changes:
            put(content, key, value)
        return validate(content)

    assert "\n" not in outcome(changed)


@quick(200)
@given(st.text(max_size=30) | st.builds("{}={}".format, PLACES, st.text(max_size=12)))
def test_loading__any_override_is_read_or_refused(override: str) -> None:
    assert "\n" not in outcome(lambda: load_recipe("demo", [override]))


@quick(150)
@given(st.text(max_size=60) | st.binary(max_size=60))
def test_loading__any_file_is_read_or_refused(content: str | bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "any.yaml"
        path.write_bytes(content.encode(errors="surrogatepass") if isinstance(content, str) else content)
        assert "\n" not in outcome(lambda: load_recipe(str(path)))


def test_loading__recipes_are_listed_by_the_command() -> None:
    command = Path(sys.executable).parent / "espalier"
    done = subprocess.run([command, "recipes"], capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    assert [line.split()[0] for line in lines] == list(shipped())
    assert all(len(line.split()) > 3 for line in lines)


def test_loading__a_recipe_travels_typed() -> None:
    """To the driver on a cluster, and with each trial: pickled, it need not be validated again."""
    for name in ("demo", "dimap/swin_t_dimap2"):
        whole = load_recipe(name)
        again = pickle.loads(pickle.dumps(whole))
        assert again == whole
        assert again.model_dump(mode="json") == whole.model_dump(mode="json")
