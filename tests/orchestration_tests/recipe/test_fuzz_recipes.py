"""A thousand recipes typed in by somebody who means no good: each is refused in one line, or can be shown."""

from __future__ import annotations

import io
import json
import random
import resource
import signal
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from image_tables import VIT, VIT_ARGS, table, write
from rich.console import Console

from orchestration.preflight.checks import prepare
from orchestration.preflight.plan import print_plan
from orchestration.recipe.loading import load_recipe
from orchestration.recipe.reference import recipe_keys
from pruners.errors import InputError

SECONDS = 20  # for one of them, on a busy machine
MEMORY = 2**30  # that all together may add, bytes
NUMBERS = ("0", "1", "-1", "2", "3", "0.5", "1e-9", "-0.0")
ENDLESS = (".inf", "-.inf", ".nan", "[.inf, .inf]", "{log: [1e-5, .inf]}")
HUGE = ("1e21", "-1e21", "1e308", str(10**21), str(2**63), str(-(2**63)), f"[{10**21}]", str(10**9), "65536")
EMPTY = ("", "''", "' '", "[]", "{}", "null", "[[]]", "['']", "{'': 1}")
DOUBLED = ("[1, 1]", "[0.5, 0.5]", "[stage, stage]", "[a, a]", "[ovit, ovit]", "{choice: [1, 1]}")
PLACES = (
    "/dev/zero",
    "/dev/null",
    "~nobody_of_ours/x",
    "s3://",
    "s3:///x",
    "nowhere://x",
    "file://nowhere/x",
    "/",
    "..",
    "a" * 300,
    f"/{'a' * 300}/b",
    '"a\\0b"',
    '"a\\nb"',
    "hf-hub:",
    "models:/",
)
WRONG = ("true", "word", "{a: 1}", "[1, word]", "2:4", "(", "'*'", "2001-99-99", "&a [*a]", "!!python/none")
KINDS = (NUMBERS, ENDLESS, HUGE, EMPTY, DOUBLED, PLACES, WRONG)
BELOW = (
    *(
        f"model.args.{key}"
        for key in ("embed_dim", "patch_size", "depth", "num_heads", "mlp_ratio", "img_size")
    ),
    *(f"recovery.optimizer_args.{key}" for key in ("eps", "betas", "momentum", "nope")),
    *(f"schedule.space.{key}" for key in ("recovery.lr.peak", "recovery.epochs", "pruning.schedule.steps")),
    *(f"long_run.{key}" for key in ("epochs", "recovery.lr")),
    "pruning.layers.QKV",
    "pruning.table.qkv",
    "pruning.floor.qkv",
    "structured.candidates",
)


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A recipe of a small model and a few images that can be shown as it is."""
    folder = tmp_path_factory.mktemp("fuzz")
    for part in ("train", "validation", "test"):
        write(folder / f"{part}.parquet", table([0, 1, 2, 0]))
    content = {
        "model": {"architecture": VIT, "args": VIT_ARGS, "classes": 3},
        "data": {part: f"{folder}/{part}.parquet" for part in ("train", "validation", "test")},
        "dense": {"epochs": 4, "distill": None},
        "recovery": {"epochs": 6, "distill": {"weight": 0.5}},
        "storage": f"{folder}/runs",
    }
    path = folder / "own.yaml"
    path.write_text(json.dumps(content))
    return str(path)


def drawn(chance: random.Random, keys: list[tuple[str, str]]) -> list[str]:
    """One to three overrides as they are typed."""
    leaves = []
    for _ in range(chance.choice((1, 1, 1, 2, 3))):
        key, values = chance.choice(keys)
        words = [word.strip() for word in values.replace(" or ", ", ").split(",")]
        kind = chance.choice((*KINDS, words) if "," in values else KINDS)
        leaves.append(f"{key}={chance.choice(kind)}")
    return leaves


def outcome(recipe: str, overrides: list[str]) -> str:
    """What a recipe is refused with; nothing if it can be shown."""
    try:
        prepared = prepare(load_recipe(recipe, overrides), dry_run=True)
    except InputError as error:
        return str(error)
    print_plan(Console(file=io.StringIO(), width=120), prepared)
    return ""


def too_long(number: int, frame: Any) -> None:
    raise TimeoutError(f"still at work after {SECONDS} s")


@pytest.mark.parametrize("cases", [200, pytest.param(1000, marks=pytest.mark.long)])
def test_fuzz_recipes__recipes_without_traceback_hang_or_memory(
    own: str, cases: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(Path(own).parent)
    assert outcome(own, []) == ""  # and what it imports is there
    chance = random.Random(cases)
    keys = [(key.name, key.values) for key in recipe_keys()]
    keys += [(key, "any") for key in BELOW]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    ends: Counter[str] = Counter()
    handler = signal.signal(signal.SIGALRM, too_long)
    try:
        for _ in range(cases):
            overrides = drawn(chance, keys)
            signal.alarm(SECONDS)
            try:
                raised = outcome(own, overrides)
            except Exception as error:
                raise AssertionError(f"espalier sweep own.yaml --dry-run {overrides}") from error
            finally:
                signal.alarm(0)
            assert len(raised.splitlines()) <= 1, overrides
            assert len(raised) < 2000, overrides
            ends["refused" if raised else "shown"] += 1
    finally:
        signal.signal(signal.SIGALRM, handler)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before < MEMORY
    assert ends["refused"] > cases / 2
    assert ends["shown"] > cases / 50  # or nothing but the reading of recipes would be tried
    assert sorted(path.name for path in Path(own).parent.iterdir()) == [
        "own.yaml",
        "test.parquet",
        "train.parquet",
        "validation.parquet",
    ]
